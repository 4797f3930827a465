"""Every optimizer under one interface: ``init(params)`` and ``step(params, state, batch, key)``."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

import kfgn
from benchmarks import BenchmarkError

Params = Any
State = Any
Batch = tuple[jax.Array, jax.Array]
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

# How many updates a run makes when the command line does not say. A second-order update costs
# about five gradient steps, so these take similar times: minutes on two CPU cores.
DEFAULT_UPDATES = {"second order": 800, "first order": 4000}

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


def closest(kind: str, name: str, known: Collection[str]) -> BenchmarkError:
    """The error for an unknown name, with the known name it is most like."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return BenchmarkError(f"no {kind} {name!r}{hint} (known: {', '.join(known)})")


def default_updates(name: str) -> int:
    """How long to train with this optimizer unless told otherwise."""
    return DEFAULT_UPDATES["second order" if name in SECOND_ORDER else "first order"]


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
    """An optax optimizer on the gradient of ``objective``."""
    make, _ = FIRST_ORDER[name]
    transformation = make(learning_rate_schedule(learning_rate, decay_period))

    def step(
        params: Params, state: State, batch: Batch, key: jax.Array
    ) -> tuple[Params, State, jax.Array]:
        del key
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return Optimizer(name, transformation.init, step)


def second_order(
    name: str,
    objective: Any,
    params: Params,
    batch: Batch,
    options: Mapping[str, Any],
    samples: int = 1,
) -> Optimizer:
    """A kfgn optimizer, with default settings except where ``options`` say otherwise."""
    transformation = getattr(kfgn, name)(objective, params, batch, **options)
    return with_curvature(name, objective, transformation, samples)


def with_curvature(
    name: str,
    objective: Any,
    transformation: optax.GradientTransformationExtraArgs,
    samples: int = 1,
) -> Optimizer:
    """A transformation of one's own that takes the curvature of a kfgn method."""
    curvature_fn = kfgn.value_grad_and_curvature(objective, name, samples=samples)

    def step(
        params: Params, state: State, batch: Batch, key: jax.Array
    ) -> tuple[Params, State, jax.Array]:
        sampling = {"key": key} if name == "kfac" else {}
        (loss, grads), curvature = curvature_fn(params, batch, **sampling)
        updates, state = transformation.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return Optimizer(name, transformation.init, step)


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
