"""The full recipe of appendix C as one transformation: both dampings adapt.

The factor damping γ is chosen by the quadratic model, which needs preconditioner,
step damping τ and previous step at once: hence one transformation of pure parts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Float

from kfgn.base.checks import check_decay, check_flag
from kfgn.base.linalg import inner
from kfgn.base.types import Array, Named, Number, PyTree, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.agreement import agreement_after
from kfgn.optimizers.damping import FactorDamping, StepDamping, rules_of
from kfgn.optimizers.layer_blocks import LayerBlocks
from kfgn.optimizers.observe import Observed, observe
from kfgn.optimizers.periods import Periods, check_period, inversion_due
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.quadratic_model import Direction, Step, best_step, combine, push
from kfgn.optimizers.sharding import preconditioner_of
from kfgn.optimizers.skipped import SkippedStreak, no_streak
from kfgn.optimizers.staggered import check_stagger, refresh_in_turns
from kfgn.optimizers.state import (
    Count,
    Flag,
    Metrics,
    all_finite,
    counter,
    is_finite,
    is_usable,
    keep_if,
    no_metrics,
    number,
    zero_unless,
    zeros_like,
)
from kfgn.optimizers.verdict import Verdict, judge
from kfgn.optimizers.wrappers import by_curvature


class ScaleByCurvatureState(NamedTuple):
    """State of `scale_by_curvature`."""

    count: Count  # type: ignore[assignment]  # updates made
    skipped: Count  # updates skipped, for numbers that were not finite
    streak: SkippedStreak  # of those, in a row up to now
    refused: Count  # steps not taken, as they extrapolate and the objective would rise
    still: Count  # updates with no gradient, or no weights, that move no parameters or dampings
    observed: Count  # factors in the average
    factors: Named  # their moving averages, Q and G
    inverses: Named  # of the damped factors, as last refreshed
    factor_damping: Scalar  # γ
    step_damping: Scalar  # τ
    step_size: Scalar  # α
    momentum: Scalar  # the coefficient of the previous step
    reduction_ratio: Scalar  # ρ = actual / predicted change of the objective, as last measured
    predicted_change: Scalar  # by the quadratic model, for the whole step that was measured
    actual_change: Scalar  # of the objective, by that step
    agreement: Scalar  # the part of a step that the next batches would have taken, on average
    evidence: Float[Array, "2"]  # for that
    metrics: Metrics
    periods: Periods
    previous: Named  # the previous step, or nothing without momentum


def scale_by_curvature(
    blocks: LayerBlocks,
    *,
    factor_damping: Number | FactorDamping | None = None,
    step_damping: Number | StepDamping = 0.1,
    decay: Number | None = 0.7,
    refresh_factors_every: int | Array = 5,
    refresh_inverse_every: int | Array = 5,
    inverse: str = "factored",
    factor_sharding: NamedSharding | None = None,
    stagger: bool = False,
    momentum: bool = True,
    warn_after_skipped: int | Array | None = 10,
    method: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions, picks the step size by the quadratic model, adapts both dampings.

    Args:
      blocks: what `kfgn.layers.find_blocks` returned, with the objective's l2.
      method: refuse curvatures of another method; None takes any.
      others: as for `kfgn.kfra`.

    Raises:
      OptionError: an option out of its range; in `update`, a curvature made
        with another l2, `unassigned` or method.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> tx = scale_by_curvature(kfgn.layers.find_blocks(objective, w, batch), step_damping=1e-6)
    >>> (value, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> step, state = tx.update(grads, tx.init(w), w, curvature=curvature)
    >>> bool(objective(w - step, batch) < 1e-6 * value)
    True
    """
    tau, gamma = rules_of(step_damping, factor_damping)
    check_decay("decay", decay)
    check_period("refresh_factors_every", refresh_factors_every)
    check_period("refresh_inverse_every", refresh_inverse_every)
    check_flag("momentum", momentum)
    preconditioner = preconditioner_of(blocks, inverse, factor_sharding)
    every = refresh_factors_every, refresh_inverse_every
    tried = jax.eval_shape(gamma.candidates, number(), number()).shape[0]
    check_stagger(stagger, refresh_inverse_every, tried)
    recipe = _Recipe(preconditioner, gamma, tau, decay, *every, momentum, stagger)
    settings: dict[str, Any] = {"l2": blocks.l2, "unassigned": blocks.treatment, "method": method}
    settings["warn_after_skipped"] = warn_after_skipped
    return by_curvature(ScaleByCurvatureState, blocks, recipe.init, recipe.advance, **settings)


#: `(inverses, γ) -> (directions, step)`, and how far the loop over candidates for γ has come:
#: its turn, the least value of the model so far, the γ of that, the last inverses. The largest
#: eigenvalue and the condition of the factors, as `Preconditioner.extremes` finds them.
Extremes: TypeAlias = tuple[Scalar, Scalar]
BestAlong: TypeAlias = Callable[[Named, Scalar], tuple[list[Direction], Step]]
Turn: TypeAlias = tuple[Count, Scalar, Scalar, Named, Extremes]


@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    preconditioner: Preconditioner
    factor_damping: FactorDamping
    step_damping: StepDamping
    decay: Number | None
    refresh_factors_every: int | Array
    refresh_inverse_every: int | Array
    momentum: bool
    stagger: bool

    @property
    def l2(self) -> Number:
        return self.preconditioner.blocks.l2

    def init(self, leaves: Named) -> ScaleByCurvatureState:
        factors, inverses = self.preconditioner.init(leaves)
        return ScaleByCurvatureState(
            count=counter(),
            skipped=counter(),
            streak=no_streak(),
            refused=counter(),
            still=counter(),
            observed=counter(),
            factors=factors,
            inverses=inverses,
            factor_damping=number(self.factor_damping.initial),
            step_damping=number(self.step_damping.initial),
            step_size=number(),
            momentum=number(),
            reduction_ratio=number(1),
            predicted_change=number(),
            actual_change=number(),
            agreement=number(1),
            evidence=jnp.zeros(2, jnp.float32),
            metrics=no_metrics(),
            periods=self._periods(),
            previous=zeros_like(leaves) if self.momentum else {},
        )

    def _periods(self) -> Periods:
        rules = self.step_damping, self.factor_damping
        refresh = self.refresh_factors_every, self.refresh_inverse_every
        every = *refresh, *(rule.period for rule in rules)
        return Periods(*(jnp.array(n, jnp.int32) for n in every))

    def advance(
        self, state: ScaleByCurvatureState, gradient: Named, curvature: Curvature, **_: Any
    ) -> tuple[Named, ScaleByCurvatureState]:
        """One update; where the batch is not usable, no step and the state as it was.

        The large arrays never pass through a conditional, which would copy
        them: selections fuse into the operations that make the arrays.
        """
        squared = inner(gradient, gradient)
        usable = is_usable(curvature, curvature.value) & is_finite(gradient, squared)
        # The factors' average, and their damped inverses at γ.
        seen_before = Observed(state.factors, state.observed, usable)
        factors, observed, usable = observe(
            *(curvature, seen_before, state.count, self.refresh_factors_every, self.decay),
            *(self.preconditioner, gradient),
        )
        along = [push(curvature, state.previous)] if self.momentum else []

        def best_along(inverses: Named, gamma: Scalar) -> tuple[list[Direction], Step]:
            # The direction, and the step by the quadratic model of the full matrix.
            direction = self.preconditioner.apply(inverses, gamma + self.l2, gradient)
            directions = [push(curvature, direction), *along]
            damping = state.step_damping + self.l2
            return directions, best_step(curvature, directions, damping, state.agreement)

        look = curvature, observed, observed > state.observed, self.decay
        usable, gamma, inverses, extremes = self._invert(state, factors, best_along, usable, look)
        directions, best = best_along(inverses, gamma)
        # A step of finite norm is finite, where its dtype holds that norm.
        most = min((float(jnp.finfo(x.dtype).max) for x in gradient.values()), default=0)
        fine = usable & all_finite(best) & (best.norm <= most)
        step = zero_unless(fine, combine(directions, best.coefficients))
        if self.momentum:  # what will be the previous step, so that it is made only once
            step = keep_if(usable, step, state.previous)
        # The reduction ratio, where it is due or in doubt, and with it τ.
        known = state.reduction_ratio, state.step_damping, state.predicted_change
        before = Verdict(*known, state.actual_change, jnp.array(True), number(1))
        evidence, agreement = agreement_after(state.evidence, best)
        given = self.step_damping, state.count, before, curvature, best, step, fine, agreement
        verdict, step = judge(*given)
        good = fine & verdict.finite
        share = jnp.where(good, verdict.share, 0)
        length = jnp.where(share > 0, share * best.norm.astype(jnp.float32), 0)
        norms = jnp.sqrt(squared), length
        seen = (jnp.asarray(x, jnp.float32) for x in (curvature.value, *norms, *extremes))
        numbers = state._replace(factors={}, inverses={}, previous={})
        advanced = numbers._replace(
            count=state.count + 1,
            observed=observed,
            factor_damping=gamma,
            refused=state.refused + (verdict.share == 0).astype(jnp.int32),
            still=state.still + (best.predicted == 0).astype(jnp.int32),
            step_damping=verdict.damping,
            step_size=verdict.share * best.step_size,
            momentum=verdict.share * best.momentum,
            reduction_ratio=verdict.ratio,
            predicted_change=verdict.predicted,
            actual_change=verdict.actual,
            agreement=agreement,
            evidence=evidence,
            metrics=Metrics(*seen),
            periods=self._periods(),
        )
        empty = (curvature.examples == 0).astype(jnp.int32)
        skipped = numbers._replace(skipped=state.skipped + 1 - empty, still=state.still + empty)
        failed = keep_if(usable, self._retreat(skipped), skipped)
        state = keep_if(good, advanced, failed)._replace(factors=factors, inverses=inverses)
        return zero_unless(usable, step), state._replace(previous=step if self.momentum else {})

    def _invert(
        self,
        state: ScaleByCurvatureState,
        factors: Named,
        best_along: BestAlong,
        usable: Flag,
        look: tuple[Curvature, Count, Flag, Number | None],
    ) -> tuple[Flag, Scalar, Named, Extremes]:
        """Whether all is usable, γ, the inverses at it, refreshed where due, their extremes then.

        A loop of no turn, one, or k + 1: where γ is due its k candidates are tried,
        then the best is inverted for good. So inversions compile once.
        """
        rule = self.factor_damping
        candidates = rule.candidates(state.factor_damping, state.step_damping)
        k = len(candidates)
        known = state.inverses, (state.metrics.largest_eigenvalue, state.metrics.condition)
        if self.stagger:
            gamma = jnp.where(usable, candidates[0], state.factor_damping)
            given = self.preconditioner, factors, known, gamma + self.l2, state.count
            every = cast(int, self.refresh_inverse_every)
            inverses, extremes = refresh_in_turns(*given, every, usable)
            inverses, fine = self.preconditioner.rescale(inverses, *look)
            return usable & fine, gamma, inverses, extremes
        refresh = usable & inversion_due(state.count, self.refresh_inverse_every)
        # Counted before the update, as refreshes are, so that both fall together.
        search = usable & (state.count > 0) & rule.due(state.count) if k > 1 else jnp.array(False)
        due = search | refresh
        parts = self.preconditioner.decompose(factors, state.inverses, due)
        parts, fine = self.preconditioner.rescale(parts, *look)
        usable = usable & fine
        if self.preconditioner.undamped:
            known = parts, known[1]
        first = jnp.where(due, candidates[0], state.factor_damping)

        def inverses_at(gamma: Scalar) -> tuple[Named, Extremes]:
            found = self.preconditioner.invert(parts, gamma + self.l2)
            return found, self.preconditioner.extremes(parts, gamma + self.l2)

        if k == 1:  # a loop of its own, with less in it to compile

            def once(_: PyTree) -> tuple[Flag, Named, Extremes]:
                return jnp.array(False), *inverses_at(first)

            return usable, first, *jax.lax.while_loop(lambda c: c[0], once, (due, *known))[1:]
        turns = jnp.where(search, k + 1, jnp.where(refresh, 1, 0))
        infinite = jnp.asarray(jnp.inf, jnp.float32)

        def model_value(inverses: Named, gamma: Scalar) -> Scalar:
            value = best_along(inverses, gamma)[1].predicted.astype(jnp.float32)
            return jnp.where(jnp.isfinite(value), value, jnp.inf)

        def turn(carry: Turn) -> Turn:
            i, least, gamma, *_ = carry
            last = i == turns - 1
            tried = jnp.where(last, gamma, candidates[jnp.minimum(i, k - 1)])
            inverses, extremes = inverses_at(tried)
            value = jax.lax.cond(last, lambda *_: infinite, model_value, inverses, tried)
            better = value < least
            gamma = jnp.where(better, tried, gamma)
            return i + 1, jnp.where(better, value, least), gamma, inverses, extremes

        start = (jnp.zeros((), jnp.int32), infinite, first, *known)
        return usable, *jax.lax.while_loop(lambda carry: carry[0] < turns, turn, start)[2:]

    def _retreat(self, state: ScaleByCurvatureState) -> ScaleByCurvatureState:
        """Stronger damping after a step whose numbers were not finite.

        The factors were finite, so it was their inversion, or the model along
        the step, that failed: retrying at the same dampings would fail again.
        """
        return state._replace(
            # Factors and inverses are new at once, and the average begins again.
            count=jnp.zeros_like(state.count),
            observed=jnp.zeros_like(state.observed),
            factor_damping=self.factor_damping.raised(state.factor_damping),
            step_damping=self.step_damping.raised(state.step_damping),
        )
