"""The parts of the recipe as optax transformations.

Each returns a positive multiple of a direction of ascent, `+C^-1 g`; the sign
of a descent step belongs to `optax.scale_by_learning_rate`. Each reads the
batch from the keyword argument `curvature` of `update`. A batch whose numbers
are not finite changes nothing but the count of skipped updates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import (
    check_decay,
    check_flag,
    check_not_negative,
    check_positive,
    check_whole,
)
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.batch import Curvature
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature
from kfgn.optimizers.preconditioner import Preconditioner, all_finite, moving_average
from kfgn.optimizers.quadratic_model import combine, minimize, push

Array = jax.Array
Named = dict[str, Any]


class ScaleByKroneckerState(NamedTuple):
    """State of `scale_by_kronecker`."""

    count: Array  # type: ignore[assignment]  # updates made
    skipped: Array  # updates skipped, for numbers that were not finite
    factors: Named
    inverses: Named


def scale_by_kronecker(
    layers: LayerBlocks,
    damping: Any = 1e-2,
    *,
    decay: Any = 0.9,
    refresh_inverse_every: Any = 1,
    inverse: str = "factored",
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `(Q ⊗ G + damping I)^-1` in every layer, eqs. (34)-(36).

    Args:
      layers: what `kfgn.layers.find_blocks` returned.
      damping: `k = γ + η`, fixed.
      decay: of the moving average of the factors, or None for none.
      refresh_inverse_every: updates between two inversions.
      inverse: "factored" (two Cholesky factorizations per layer) or "eigen"
        (exact, two eigendecompositions).
    """
    check_positive("damping", damping)
    check_decay("decay", decay)
    check_whole("refresh_inverse_every", refresh_inverse_every, 1, traced=True)
    preconditioner = Preconditioner(layers, inverse)

    def init(params):
        factors, inverses = preconditioner.init(named_leaves(params))
        return ScaleByKroneckerState(_zero(), _zero(), factors, inverses)

    def update(updates, state, params=None, *, curvature: Curvature | None = None, **extra):
        del params, extra
        gradient = named_leaves(updates)
        check_state(state, ScaleByKroneckerState)
        check_layers(layers, gradient, state.factors)
        curvature = require_curvature(curvature, layers, gradient)
        new = {name: curvature.factors[name] for name in state.factors}

        def advance():
            count = state.count + 1
            factors = moving_average(state.factors, new, count, decay)
            total = jnp.asarray(damping)
            due = refresh_due(state.count, refresh_inverse_every)
            parts = preconditioner.decompose(factors, state.inverses, due)
            inverses = jax.lax.cond(
                due, lambda: preconditioner.invert(parts, total), lambda: state.inverses
            )
            direction = preconditioner.apply(inverses, total, gradient)
            moved = ScaleByKroneckerState(count, state.skipped, factors, inverses)
            return keep_if(all_finite(direction), (direction, moved), skip())

        def skip():
            stay = state._replace(skipped=state.skipped + 1)
            return {n: jnp.zeros_like(g) for n, g in gradient.items()}, stay

        direction, state = jax.lax.cond(all_finite((gradient, new)), advance, skip)
        return with_leaves(updates, direction), state

    return optax.GradientTransformationExtraArgs(init, update)


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`."""

    skipped: Array
    step_size: Array  # α
    momentum: Array  # the coefficient of the previous step
    previous: Named  # the previous step, or nothing without momentum


def scale_by_quadratic_model(
    damping: Any = 0.0, *, momentum: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Scales a direction to the minimum of the quadratic model along it, eq. (40).

    The model has the full Gauss-Newton matrix of the batch, so this makes a
    step size for any direction, not only one of kfgn's.

    Args:
      damping: `τ + η`, added to the Gauss-Newton matrix.
      momentum: minimize over the span of the direction and the previous step
        (Martens & Grosse 2015, section 7).
    """
    check_not_negative("damping", damping)
    check_flag("momentum", momentum)

    def init(params):
        leaves = named_leaves(params)
        previous = jax.tree.map(jnp.zeros_like, leaves) if momentum else {}
        one = jnp.ones((), jnp.float32)
        return ScaleByQuadraticModelState(_zero(), one, jnp.zeros_like(one), previous)

    def update(updates, state, params=None, *, curvature: Curvature | None = None, **extra):
        del params, extra
        leaves = named_leaves(updates)
        check_state(state, ScaleByQuadraticModelState)
        curvature = require_curvature(curvature, _NO_BLOCKS, leaves)
        directions = [push(curvature, leaves)]
        if momentum:
            directions.append(push(curvature, state.previous))
        step = minimize(curvature, directions, jnp.asarray(damping))
        scaled = combine(directions, step.coefficients)
        zeros = {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}
        mu = step.coefficients[1] if momentum else jnp.zeros(())
        moved = ScaleByQuadraticModelState(
            state.skipped,
            step.coefficients[0].astype(jnp.float32),
            mu.astype(jnp.float32),
            scaled if momentum else {},
        )
        stay = state._replace(skipped=state.skipped + 1)
        usable = all_finite((step, scaled))
        scaled, state = keep_if(usable, (scaled, moved), (zeros, stay))
        return with_leaves(updates, scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


class AverageParametersState(NamedTuple):
    """State of `average_parameters`."""

    count: Array  # type: ignore[assignment]  # updates seen
    average: Any  # a pytree like params


def average_parameters(decay: Any = 0.95) -> optax.GradientTransformationExtraArgs:
    """Tracks `θ^ = β θ^ + (1 - β) θ`, `β = min(decay, 1 - 1/t)`, eqs. (44)-(45).

    The updates pass through; it must come last in a chain, so that it sees the
    step that is really taken. Read the average from the state's `average`.
    """
    check_decay("decay", decay)

    def init(params):
        # A copy, so that params and state can both be donated.
        return AverageParametersState(_zero(), jax.tree.map(jnp.array, params))

    def update(updates, state, params=None, **extra):
        del extra
        if params is None:
            raise OptionError("average_parameters needs params: call update(grads, state, params)")
        count = state.count + 1
        moved = optax.apply_updates(params, updates)
        average = moving_average(state.average, moved, count, decay)
        return updates, AverageParametersState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)


def refresh_due(count: Array, every: Any) -> Array:
    """Whether to invert after `count` updates: every so often, and always at the start.

    The moving average moves fastest at the start, so the first `every` updates
    each get fresh inverses.
    """
    return (count % every == 0) | (count < every)


def keep_if(condition: Array, new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`, for two pytrees alike."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def check_state(state: Any, kind: type) -> None:
    """Raises OptionError for the state of another transformation."""
    if not isinstance(state, kind):
        raise OptionError(
            f"the state must be a {kind.__name__}, found a {type(state).__name__}: pass the one "
            "that this transformation's init or last update returned."
        )


def check_layers(layers: LayerBlocks, leaves: Named, initialized: Named) -> None:
    """Raises ParameterError where updates do not match what init saw."""
    found = {*layers.present(leaves), *layers.diagonals(leaves)}
    if found != set(initialized):
        raise ParameterError(
            f"update got gradients of {sorted(found)}, but init saw {sorted(initialized)}; "
            "initialize the state from the same params (and the same mask)."
        )


_NO_BLOCKS = LayerBlocks({}, (), {})


def _zero() -> Array:
    # An array, not a Python int: some containers treat ints as static.
    return jnp.zeros((), jnp.int32)
