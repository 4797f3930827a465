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

from kfgn.base.checks import check_decay, check_flag, check_not_negative, check_pair, check_whole
from kfgn.base.errors import OptionError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.batch import Curvature
from kfgn.optimizers.damping import Damping, check_damping
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature
from kfgn.optimizers.preconditioner import Preconditioner, all_finite, moving_average
from kfgn.optimizers.quadratic_model import Direction, combine, minimize, push
from kfgn.optimizers.transforms import check_layers, check_state, keep_if, refresh_due
from kfgn.optimizers.trust import judge

Array = jax.Array
Named = dict[str, Any]


class ScaleByCurvatureState(NamedTuple):
    """State of `scale_by_curvature`."""

    count: Array  # type: ignore[assignment]  # updates made
    skipped: Array  # updates skipped, for numbers that were not finite
    refused: Array  # steps not taken, as they extrapolate and the objective would rise
    factors: Named  # their moving averages, Q and G
    inverses: Named  # of the damped factors, as last refreshed
    factor_damping: Array  # γ
    step_damping: Array  # τ
    step_size: Array  # α
    momentum: Array  # the coefficient of the previous step
    reduction_ratio: Array  # ρ, as last measured
    previous: Named  # the previous step, or nothing without momentum


def scale_by_curvature(
    layers: LayerBlocks,
    *,
    l2: Any,
    factor_damping: Damping | None,
    step_damping: Damping,
    thresholds: tuple[float, float] = (0.25, 0.75),
    decay: Any = 0.9,
    refresh_inverse_every: Any = 1,
    inverse: str = "factored",
    momentum: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions, picks the step size by the quadratic model, adapts both dampings.

    Args:
      layers: what `kfgn.layers.find_blocks` returned.
      l2: η, the weight of the objective's penalty.
      factor_damping: of the Kronecker factors, γ; it adapts greedily among
        `{ωγ, γ, γ/ω}` by the quadratic model (appendix C.3.2). None lets γ
        follow τ, as the initial damping of Martens & Grosse does.
      step_damping: of the quadratic model, τ; it adapts by the reduction ratio
        (appendix C.3.1).
      thresholds: τ falls where ρ is above the second, rises below the first.
      decay: of the moving average of the factors, or None for none.
      refresh_inverse_every: updates between two inversions.
      inverse: "factored" (eq. 36) or "eigen" (eq. 35).
      momentum: a second direction, the previous step, in the quadratic model
        (Martens & Grosse 2015, section 7). A step that goes against it, or more
        than once along it, is taken only where the objective falls.
    """
    check_damping("step_damping", step_damping)
    least, of = step_damping.minimum, "step_damping, which factor_damping follows,"
    if factor_damping is not None:
        check_damping("factor_damping", factor_damping)
        least, of = factor_damping.minimum, "factor_damping"
    if isinstance(least, (int, float)) and least <= 0:
        raise OptionError(f"{of} needs a positive minimum: factors may be singular; found {least}")
    check_decay("decay", decay)
    check_whole("refresh_inverse_every", refresh_inverse_every, 1, traced=True)
    check_flag("momentum", momentum)
    check_not_negative("l2", l2)
    low, high = check_pair("thresholds", thresholds)
    recipe = _Recipe(
        preconditioner=Preconditioner(layers, inverse),
        l2=l2,
        factor_damping=factor_damping,
        step_damping=step_damping,
        thresholds=(low, high),
        decay=decay,
        refresh_inverse_every=refresh_inverse_every,
        momentum=momentum,
    )

    def init(params):
        return recipe.init(named_leaves(params))

    def update(updates, state, params=None, *, curvature: Curvature | None = None, **extra):
        del params, extra
        check_state(state, ScaleByCurvatureState)
        gradient = named_leaves(updates)
        curvature = require_curvature(curvature, layers, gradient)
        check_layers(layers, gradient, state.factors)
        new = {name: curvature.factors[name] for name in state.factors}
        usable = all_finite((gradient, curvature.value, new))
        step, state = recipe.advance(state, gradient, new, curvature, usable)
        return with_leaves(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    preconditioner: Preconditioner
    l2: Any
    factor_damping: Damping | None
    step_damping: Damping
    thresholds: tuple[float, float]
    decay: Any
    refresh_inverse_every: Any
    momentum: bool

    def init(self, leaves: Named) -> ScaleByCurvatureState:
        factors, inverses = self.preconditioner.init(leaves)

        # Each an array of its own: buffers that are shared could not be donated.
        def number(value: Any, dtype: Any = jnp.float32) -> Array:
            return jnp.array(value, dtype)

        return ScaleByCurvatureState(
            count=number(0, jnp.int32),
            skipped=number(0, jnp.int32),
            refused=number(0, jnp.int32),
            factors=factors,
            inverses=inverses,
            factor_damping=number((self.factor_damping or self.step_damping).initial),
            step_damping=number(self.step_damping.initial),
            step_size=number(0),
            momentum=number(0),
            reduction_ratio=number(1),
            previous=jax.tree.map(jnp.zeros_like, leaves) if self.momentum else {},
        )

    def advance(
        self,
        state: ScaleByCurvatureState,
        gradient: Named,
        new: Named,
        curvature: Curvature,
        usable: Array,
    ) -> tuple[Named, ScaleByCurvatureState]:
        """One update; where the batch is not usable, no step and the state as it was.

        The large arrays never pass through a conditional, which would copy
        them: selections fuse into the operations that make the arrays.
        """
        count = state.count + 1
        average = moving_average(state.factors, new, count, self.decay)
        factors = keep_if(usable, average, state.factors)
        due = usable & refresh_due(state.count, self.refresh_inverse_every)
        before = [push(curvature, state.previous)] if self.momentum else []
        gamma, inverses, direction = self._precondition(
            state, factors, gradient, curvature, due, usable, before
        )
        directions = [push(curvature, direction), *before]
        step = minimize(curvature, directions, state.step_damping + self.l2)
        moved = combine(directions, step.coefficients)
        known, due = (state.reduction_ratio, state.step_damping), self.step_damping.due(count)
        verdict = judge(
            curvature, step, moved, known, self.step_damping, self.thresholds, due, usable
        )
        good = usable & verdict.finite & all_finite((step, moved))
        taken = good & ~verdict.refused
        moved = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), moved)
        advanced = state._replace(
            count=count,
            factor_damping=gamma,
            refused=state.refused + verdict.refused.astype(jnp.int32),
            step_damping=verdict.damping,
            step_size=step.coefficients[0].astype(jnp.float32),
            momentum=step.coefficients[-1].astype(jnp.float32) * float(self.momentum),
            reduction_ratio=verdict.ratio,
        )
        skipped = state._replace(skipped=state.skipped + 1)
        numbers = _select(good, advanced, _select(usable, self._retreat(skipped), skipped))
        previous = moved if self.momentum else {}
        if self.momentum:
            previous = keep_if(usable, moved, state.previous)
        return moved, numbers._replace(factors=factors, inverses=inverses, previous=previous)

    def _precondition(
        self,
        state: ScaleByCurvatureState,
        factors: Named,
        gradient: Named,
        curvature: Curvature,
        due: Array,
        usable: Array,
        before: list[Direction],
    ) -> tuple[Array, Named, Named]:
        """γ, the inverses, and the direction; inverses are refreshed where that is due.

        A loop of no turn, one, or four: three dampings are tried where γ
        adapts, then the best is inverted for good. What an inversion compiles
        to so stands in the program once.
        """
        if self.factor_damping is None:
            gamma = jnp.where(due, state.step_damping, state.factor_damping)
            inverses = self._refresh(state, factors, gamma, due)
            return gamma, inverses, self.preconditioner.apply(inverses, gamma + self.l2, gradient)
        # Counted before the update, as refreshes are, so that both fall together.
        adapts = usable & (state.count > 0) & self.factor_damping.due(state.count)
        turns = jnp.where(adapts, 4, jnp.where(due, 1, 0))
        parts = self.preconditioner.decompose(factors, state.inverses, turns > 0)
        factor = jnp.asarray(self.factor_damping.factor, jnp.float32)
        ratios = jnp.stack([jnp.ones_like(factor), factor, 1 / factor])
        candidates = self.factor_damping.clip(state.factor_damping * ratios)

        def model_value(inverses, gamma):
            direction = self.preconditioner.apply(inverses, gamma + self.l2, gradient)
            directions = [push(curvature, direction), *before]
            step = minimize(curvature, directions, state.step_damping + self.l2)
            value = step.predicted.astype(jnp.float32)
            return jnp.where(jnp.isfinite(value), value, jnp.inf)

        def turn(carry):
            k, best, gamma, _ = carry
            last = k == turns - 1
            tried = jnp.where(last, gamma, candidates[jnp.minimum(k, 2)])
            inverses = self.preconditioner.invert(parts, tried + self.l2)
            value = jax.lax.cond(
                last, lambda *_: jnp.asarray(jnp.inf, jnp.float32), model_value, inverses, tried
            )
            better = value < best
            gamma = jnp.where(better, tried, gamma)
            return k + 1, jnp.where(better, value, best), gamma, inverses

        infinite = jnp.asarray(jnp.inf, jnp.float32)
        start = (jnp.zeros((), jnp.int32), infinite, state.factor_damping, state.inverses)
        *_, gamma, inverses = jax.lax.while_loop(lambda carry: carry[0] < turns, turn, start)
        return gamma, inverses, self.preconditioner.apply(inverses, gamma + self.l2, gradient)

    def _refresh(
        self, state: ScaleByCurvatureState, factors: Named, gamma: Array, due: Array
    ) -> Named:
        """The inverses at γ where that is due, else the old ones; a loop of one turn at most."""
        parts = self.preconditioner.decompose(factors, state.inverses, due)

        def turn(carry):
            return jnp.array(False), self.preconditioner.invert(parts, gamma + self.l2)

        return jax.lax.while_loop(lambda carry: carry[0], turn, (due, state.inverses))[1]

    def _retreat(self, state: ScaleByCurvatureState) -> ScaleByCurvatureState:
        """Stronger damping after a step whose numbers were not finite.

        The factors were finite, so it was their inversion, or the model along
        the step, that failed: retrying at the same dampings would fail again.
        """
        return state._replace(
            count=jnp.zeros_like(state.count),  # refresh the inverses at once
            factor_damping=(self.factor_damping or self.step_damping).clip(
                10 * state.factor_damping
            ),
            step_damping=self.step_damping.clip(10 * state.step_damping),
        )


def _select(
    condition: Array, new: ScaleByCurvatureState, old: ScaleByCurvatureState
) -> ScaleByCurvatureState:
    """`new` where the condition holds, else `old`, in the fields that are numbers."""
    fields: dict[str, Any] = {
        name: jnp.where(condition, getattr(new, name), getattr(old, name))
        for name in ScaleByCurvatureState._fields
        if name not in ("factors", "inverses", "previous")
    }
    return old._replace(**fields)
