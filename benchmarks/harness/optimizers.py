"""Every optimizer under one interface: ``init(params)`` and ``step(params, state, batch, key)``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

import kfgn
from benchmarks import BenchmarkError

Params = Any
State = Any
Batch = tuple[Any, Any]
Step = Callable[[Params, State, Batch, jax.Array], tuple[Params, State, jax.Array]]

# name: (make the optax transformation from a learning rate, the learning rate when none is given)
FIRST_ORDER: dict[str, tuple[Callable[[Any], optax.GradientTransformation], float]] = {
    "adam": (optax.adam, 1e-3),
    "sgd": (optax.sgd, 2.0**-8),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 2.0**-9),
    "nesterov": (lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True), 2.0**-9),
}
SECOND_ORDER = ("kfra", "kflr", "kfac")
NAMES = (*SECOND_ORDER, *FIRST_ORDER)

# What the second-order methods adapt, recorded with the losses wherever their state has it.
STATE_METRICS = (
    "step_damping",
    "factor_damping",
    "step_size",
    "reduction_ratio",
    "skipped",
    "refused",
)


@dataclass(frozen=True)
class Optimizer:
    """One optimizer, ready to train: ``step`` is pure, and jitted by whoever trains with it."""

    name: str
    init: Callable[[Params], State]
    step: Step


def default_learning_rate(name: str, given: float | None = None) -> float:
    """The learning rate of a first-order optimizer, unless one is given."""
    return FIRST_ORDER[name][1] if given is None else given


def learning_rate_schedule(rate: float, decay_period: int | None) -> optax.ScalarOrSchedule:
    """A constant rate, or one halved every ``decay_period`` updates."""
    if decay_period is None:
        return rate
    return optax.exponential_decay(rate, decay_period, decay_rate=0.5, staircase=True)


def first_order(
    name: str, objective: Any, learning_rate: float, decay_period: int | None = None
) -> Optimizer:
    """An optimizer of `FIRST_ORDER` on the gradient of ``objective``."""
    make, _ = FIRST_ORDER[name]
    return with_gradient(name, objective, make(learning_rate_schedule(learning_rate, decay_period)))


def with_gradient(
    name: str, objective: Any, transformation: optax.GradientTransformation
) -> Optimizer:
    """A transformation of the gradient, which may ask for the objective: for a line search, or
    for its Hessian."""
    extended = optax.with_extra_args_support(transformation)

    def step(
        params: Params, state: State, batch: Batch, key: jax.Array
    ) -> tuple[Params, State, jax.Array]:
        del key
        value, grads = jax.value_and_grad(objective)(params, batch)
        own = on_batch(objective, batch)
        updates, state = extended.update(
            grads, state, params, value=value, grad=grads, value_fn=own, obj_fn=own, batch=batch
        )
        return optax.apply_updates(params, updates), state, value

    return Optimizer(name, transformation.init, step)


def on_batch(objective: Any, batch: Batch) -> Callable[..., jax.Array]:
    """The objective as a function of the parameters alone.

    optax's line searches hand on what else an update was given, and insist that it is taken.
    """
    return lambda params, batch=batch, obj_fn=None: objective(params, batch)


def second_order(
    name: str,
    objective: Any,
    params: Params,
    batch: Batch,
    options: Mapping[str, Any],
    **of_curvature: Any,
) -> Optimizer:
    """A kfgn optimizer, with default settings except where ``options`` say otherwise."""
    transformation = getattr(kfgn, name)(objective, params, batch, **options)
    return with_curvature(name, objective, transformation, **of_curvature)


def with_curvature(
    method: str,
    objective: Any,
    transformation: optax.GradientTransformationExtraArgs,
    extra: Callable[..., dict[str, Any]] = lambda batch, value, grads: {},
    **of_curvature: Any,
) -> Optimizer:
    """A transformation of one's own that takes the curvature of a kfgn method.

    Args:
      method: of `kfgn.value_grad_and_curvature`, and `of_curvature` its options.
      objective: what is minimized.
      transformation: of the gradient.
      extra: more keywords for its update.
    """
    curvature_fn = with_key(objective, method, **of_curvature)

    def step(
        params: Params, state: State, batch: Batch, key: jax.Array
    ) -> tuple[Params, State, jax.Array]:
        (value, grads), curvature = curvature_fn(params, batch, key)
        updates, state = transformation.update(
            grads, state, params, curvature=curvature, **extra(batch, value, grads)
        )
        return optax.apply_updates(params, updates), state, value

    return Optimizer(method, transformation.init, step)


def with_key(objective: Any, method: str, **options: Any) -> Callable[..., Any]:
    """`kfgn.value_grad_and_curvature` as `(params, batch, key)`: KFAC alone draws from the key."""
    curvature_fn = kfgn.value_grad_and_curvature(objective, method, **options)
    if method == "kfac":
        return lambda params, batch, key: curvature_fn(params, batch, key=key)
    return lambda params, batch, key: curvature_fn(params, batch)


def trained(
    optimizer: Optimizer, params: Params, batch: Callable[[Any], Batch], steps: int
) -> Params:
    """The parameters after so many steps in one program, the k-th on the batch ``batch(k)``."""

    def step(carry: Any, k: Any) -> Any:
        params, state = carry
        params, state, _ = optimizer.step(params, state, batch(k), jax.random.key(0))
        return (params, state), None

    carry = params, optimizer.init(params)
    return jax.jit(lambda c: jax.lax.scan(step, c, jax.numpy.arange(steps))[0])(carry)[0]


def check_options(
    name: str, objective: Any, params: Params, batch: Batch, options: Mapping[str, Any]
) -> None:
    """Tries the options of a kfgn optimizer, without computing anything."""
    try:  # kfgn looks at its options when it starts, and some not before the first step
        optimizer = second_order(name, objective, params, batch, options)
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.step, params, state, batch, jax.random.key(0))
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"{name}: {str(error).splitlines()[0]}") from error


def state_metrics(state: State) -> dict[str, float]:
    """The numbers of ``STATE_METRICS`` that this optimizer's state has."""
    found = {}
    for name in STATE_METRICS:
        matches = optax.tree_utils.tree_get_all_with_path(state, name)
        if matches:
            found[name] = np.asarray(matches[0][1]).item()
    return found


def evaluated_params(params: Params, state: State) -> Params:
    """The average of the parameters where the optimizer keeps one, else the parameters."""
    averages = optax.tree_utils.tree_get_all_with_path(state, "average")
    return averages[0][1] if averages else params
