"""The full recipe of appendix C as one transformation: both dampings adapt.

The factor damping γ is chosen greedily by the quadratic model, which needs the
preconditioner, the step damping τ and the previous step at once: hence one
transformation, made of the same pure parts as the separate ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.blocks import Blocks, require_curvature
from kfgn.curvature import Curvature, Factors
from kfgn.damping import Damping, check_damping, levenberg_marquardt
from kfgn.errors import OptionError
from kfgn.paths import named_leaves, with_leaves
from kfgn.precondition import Preconditioner, all_finite, moving_average
from kfgn.quadratic import Direction, Step, combine, minimise, push
from kfgn.transform import check_decay, check_layers, check_period, keep_if, refresh_due

Array = jax.Array
Named = dict[str, Any]


class ScaleByCurvatureState(NamedTuple):
    """State of `scale_by_curvature`."""

    count: Array  # updates made
    skipped: Array  # updates skipped, for numbers that were not finite
    factors: dict[str, Factors]  # their moving averages, Q and G
    inverses: Named  # of the damped factors, as last refreshed
    factor_damping: Array  # γ
    step_damping: Array  # τ
    step_size: Array  # α
    momentum: Array  # the coefficient of the previous step
    reduction_ratio: Array  # ρ, as last measured
    previous: Named  # the previous step, or nothing without momentum


def scale_by_curvature(
    layers: Blocks,
    *,
    l2: Any,
    factor_damping: Damping,
    step_damping: Damping,
    thresholds: tuple[float, float] = (0.25, 0.75),
    decay: Any = 0.9,
    refresh_inverse_every: Any = 1,
    inverse: str = "factored",
    momentum: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions, picks the step size by the quadratic model, adapts both dampings.

    Args:
      layers: what `kfgn.layers` returned.
      l2: η, the weight of the objective's penalty.
      factor_damping: of the Kronecker factors, γ; it adapts greedily among
        `{ωγ, γ, γ/ω}` by the quadratic model (appendix C.3.2).
      step_damping: of the quadratic model, τ; it adapts by the reduction ratio
        (appendix C.3.1).
      thresholds: τ falls where ρ is above the second, rises below the first.
      decay: of the moving average of the factors, or None for none.
      refresh_inverse_every: updates between two inversions.
      inverse: "factored" (eq. 36) or "eigen" (eq. 35).
      momentum: a second direction, the previous step, in the quadratic model.
    """
    check_damping("factor_damping", factor_damping)
    check_damping("step_damping", step_damping)
    if isinstance(factor_damping.minimum, (int, float)) and factor_damping.minimum <= 0:
        raise OptionError("factor_damping needs a positive minimum: factors may be singular")
    check_decay("decay", decay)
    check_period("refresh_inverse_every", refresh_inverse_every)
    low, high = thresholds
    if low > high:
        raise OptionError(f"thresholds must be (low, high) with low <= high, found {thresholds}")
    recipe = _Recipe(
        Preconditioner(layers, inverse), l2, factor_damping, step_damping, (low, high), momentum
    )

    def init(params):
        return recipe.init(named_leaves(params))

    def update(updates, state, params=None, *, curvature: Curvature | None = None, **extra):
        del params, extra
        require_curvature(curvature, layers)
        gradient = named_leaves(updates)
        check_layers(layers, gradient, state.factors)
        new = {name: curvature.factors[name] for name in state.factors}

        def advance():
            count = state.count + 1
            factors = moving_average(state.factors, new, count, decay)
            due = refresh_due(state.count, refresh_inverse_every)
            return recipe.advance(
                state._replace(count=count, factors=factors), gradient, curvature, due
            )

        def skip():
            zeros = {n: jnp.zeros_like(g) for n, g in gradient.items()}
            return zeros, state._replace(skipped=state.skipped + 1)

        usable = all_finite((gradient, curvature.value, new))
        step, state = jax.lax.cond(usable, advance, skip)
        return with_leaves(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    preconditioner: Preconditioner
    l2: Any
    factor_damping: Damping
    step_damping: Damping
    thresholds: tuple[float, float]
    momentum: bool

    def init(self, leaves: Named) -> ScaleByCurvatureState:
        factors, inverses = self.preconditioner.init(leaves)
        zero, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        return ScaleByCurvatureState(
            count=zero,
            skipped=zero,
            factors=factors,
            inverses=inverses,
            factor_damping=number + self.factor_damping.initial,
            step_damping=number + self.step_damping.initial,
            step_size=number,
            momentum=number,
            reduction_ratio=number + 1,
            previous=jax.tree.map(jnp.zeros_like, leaves) if self.momentum else {},
        )

    def advance(
        self, state: ScaleByCurvatureState, gradient: Named, curvature: Curvature, due: Array
    ) -> tuple[Named, ScaleByCurvatureState]:
        """One update from finite numbers; `state` already has the new factors and count."""
        before = [push(curvature, state.previous)] if self.momentum else []
        state, direction = self._precondition(state, gradient, curvature, due, before)
        directions = [push(curvature, direction), *before]
        step = minimise(curvature, directions, state.step_damping + self.l2)
        moved = combine(directions, step.coefficients)
        state, accepted = self._adapt_step_damping(state, curvature, step, moved)
        number = jnp.float32
        state = state._replace(
            step_size=step.coefficients[0].astype(number),
            momentum=step.coefficients[1].astype(number) if self.momentum else state.momentum,
            previous=moved if self.momentum else {},
        )
        return self._or_retreat(all_finite((step, moved)) & accepted, moved, state)

    def _precondition(
        self,
        state: ScaleByCurvatureState,
        gradient: Named,
        curvature: Curvature,
        due: Array,
        before: list[Direction],
    ) -> tuple[ScaleByCurvatureState, Named]:
        """Refreshes inverses where due, trying three dampings where γ adapts.

        A loop of 0, 1 or 3 turns: what an inversion compiles to stands in the
        program once.
        """
        adapts = self.factor_damping.due(state.count)
        turns = jnp.where(adapts, 3, jnp.where(due, 1, 0))
        parts = self.preconditioner.decompose(state.factors, state.inverses, turns > 0)
        ratios = jnp.asarray([1.0, 1.0, 1.0], jnp.float32)
        factor = jnp.asarray(self.factor_damping.factor, jnp.float32)
        ratios = jnp.stack([ratios[0], factor, 1 / factor])

        def model_value(inverses, gamma):
            direction = self.preconditioner.apply(inverses, gamma + self.l2, gradient)
            step = minimise(
                curvature, [push(curvature, direction), *before], state.step_damping + self.l2
            )
            return jnp.where(jnp.isfinite(step.predicted), step.predicted, jnp.inf).astype(
                jnp.float32
            )

        def turn(carry):
            k, best, best_gamma, best_inverses = carry
            gamma = self.factor_damping.clip(state.factor_damping * ratios[k])
            inverses = self.preconditioner.invert(parts, gamma + self.l2)
            value = jax.lax.cond(
                turns > 1, model_value, lambda *_: jnp.zeros((), jnp.float32), inverses, gamma
            )
            better = (k == 0) | (value < best)
            kept = jax.lax.cond(better, lambda: inverses, lambda: best_inverses)
            return (
                k + 1,
                jnp.where(better, value, best),
                jnp.where(better, gamma, best_gamma),
                kept,
            )

        start = (jnp.zeros((), jnp.int32), jnp.float32(0), state.factor_damping, state.inverses)
        *_, gamma, inverses = jax.lax.while_loop(lambda carry: carry[0] < turns, turn, start)
        direction = self.preconditioner.apply(inverses, gamma + self.l2, gradient)
        return state._replace(factor_damping=gamma, inverses=inverses), direction

    def _adapt_step_damping(
        self, state: ScaleByCurvatureState, curvature: Curvature, step: Step, moved: Named
    ) -> tuple[ScaleByCurvatureState, Array]:
        """Measures ρ where it is due; a step to where the objective is not finite is refused."""

        def measure():
            after = curvature.displaced(jax.tree.map(jnp.negative, moved))
            ratio = ((after - curvature.value) / step.predicted).astype(jnp.float32)
            tau = levenberg_marquardt(
                self.step_damping, state.step_damping, ratio, *self.thresholds
            )
            return ratio, tau, jnp.isfinite(after)

        def keep():
            return state.reduction_ratio, state.step_damping, jnp.array(True)

        due = self.step_damping.due(state.count)
        ratio, tau, finite = jax.lax.cond(due, measure, keep)
        return state._replace(reduction_ratio=ratio, step_damping=tau), finite

    def _or_retreat(
        self, usable: Array, moved: Named, state: ScaleByCurvatureState
    ) -> tuple[Named, ScaleByCurvatureState]:
        """The step, or none and stronger damping where its numbers are not finite.

        The factors were finite, so it was their inversion, or the model along
        the step, that failed: retrying at the same dampings would fail again.
        """
        zeros = jax.tree.map(jnp.zeros_like, moved)
        retreat = state._replace(
            count=jnp.zeros_like(state.count),  # refresh the inverses at once
            skipped=state.skipped + 1,
            inverses=jax.tree.map(jnp.zeros_like, state.inverses),
            factor_damping=self.factor_damping.clip(10 * state.factor_damping),
            step_damping=self.step_damping.clip(10 * state.step_damping),
            step_size=jnp.zeros_like(state.step_size),
            momentum=jnp.zeros_like(state.momentum),
            previous=jax.tree.map(jnp.zeros_like, state.previous),
        )
        return jax.lax.cond(usable, lambda: (moved, state), lambda: (zeros, retreat))
