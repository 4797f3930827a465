"""The full recipe of appendix C as one transformation: both dampings adapt.

The factor damping γ is chosen by the quadratic model, which needs preconditioner,
step damping τ and previous step at once: hence one transformation of pure parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_decay, check_flag, check_whole
from kfgn.base.errors import OptionError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Named, Number, PyTree
from kfgn.curvature.batch import Curvature
from kfgn.optimizers.damping import (
    FactorDamping,
    Following,
    Greedy,
    LevenbergMarquardt,
    StepDamping,
    as_rule,
)
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature, require_settings
from kfgn.optimizers.preconditioner import Preconditioner, moving_average, refresh_due
from kfgn.optimizers.quadratic_model import Direction, Step, best_step, combine, push
from kfgn.optimizers.state import all_finite, check_state, counter, keep_if, number, zeros_like


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
    blocks: LayerBlocks,
    *,
    factor_damping: Number | FactorDamping | None = None,
    step_damping: Number | StepDamping = 2.0,
    decay: Number | None = 0.85,
    refresh_inverse_every: Any = 5,
    inverse: str = "factored",
    momentum: bool = True,
    method: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions, picks the step size by the quadratic model, adapts both dampings.

    Args:
      blocks: what `kfgn.layers.find_blocks` returned, with the objective's l2.
      factor_damping: γ, of the Kronecker factors; None lets it follow τ, a
        number starts `kfgn.transforms.Greedy`, or a rule.
      step_damping: τ, of the quadratic model; a number starts
        `kfgn.transforms.LevenbergMarquardt`, or a rule.
      decay: of the moving average of the factors, or None for none.
      refresh_inverse_every: updates between two inversions.
      inverse: "factored" (eq. 36) or "eigen" (eq. 35).
      momentum: a second direction, the previous step, in the quadratic model
        (Martens & Grosse 2015, section 7). A step that goes against it, or more
        than once along it, is taken only where the objective falls.
      method: refuse curvatures of another method; None takes any.

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
    tau = as_rule("step_damping", step_damping, StepDamping, LevenbergMarquardt)
    if factor_damping is None:
        factor_damping = Following()
    gamma = as_rule("factor_damping", factor_damping, FactorDamping, Greedy).beside(tau)
    if isinstance(gamma.least, (int, float)) and gamma.least <= 0:
        raise OptionError(
            "factor_damping, or the step_damping that it follows, needs a positive minimum: "
            f"factors may be singular; found {gamma.least}"
        )
    check_decay("decay", decay)
    check_whole("refresh_inverse_every", refresh_inverse_every, 1, traced=True)
    check_flag("momentum", momentum)
    preconditioner = Preconditioner(blocks, inverse)
    recipe = _Recipe(preconditioner, gamma, tau, decay, refresh_inverse_every, momentum)
    settings = {"l2": blocks.l2, "unassigned": blocks.treatment, "method": method}

    def init(params: PyTree) -> ScaleByCurvatureState:
        return recipe.init(named_leaves(params))

    def update(updates, state, params=None, *, curvature: Curvature | None = None, **extra):
        del params, extra
        check_state(state, ScaleByCurvatureState)
        gradient = named_leaves(updates)
        curvature = require_curvature(curvature, blocks, gradient)
        require_settings(curvature, **settings)
        blocks.check_seen(gradient, state.factors)
        step, state = recipe.advance(state, gradient, curvature)
        return with_leaves(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


class _Verdict(NamedTuple):
    """What measuring a step found, or what was known before where it was not measured."""

    ratio: Array  # ρ, eq. (42)
    damping: Array  # τ for the next update
    finite: Array  # false where the objective after the step was found not to be
    refused: Array  # the step extrapolates, and the objective would rise


@dataclasses.dataclass(frozen=True, eq=False)
class _Recipe:
    preconditioner: Preconditioner
    factor_damping: FactorDamping
    step_damping: StepDamping
    decay: Number | None
    refresh_inverse_every: Any
    momentum: bool

    @property
    def l2(self) -> Number:
        return self.preconditioner.blocks.l2

    def init(self, leaves: Named) -> ScaleByCurvatureState:
        factors, inverses = self.preconditioner.init(leaves)
        return ScaleByCurvatureState(
            count=counter(),
            skipped=counter(),
            refused=counter(),
            factors=factors,
            inverses=inverses,
            factor_damping=number(self.factor_damping.initial),
            step_damping=number(self.step_damping.initial),
            step_size=number(),
            momentum=number(),
            reduction_ratio=number(1),
            previous=zeros_like(leaves) if self.momentum else {},
        )

    def advance(
        self, state: ScaleByCurvatureState, gradient: Named, curvature: Curvature
    ) -> tuple[Named, ScaleByCurvatureState]:
        """One update; where the batch is not usable, no step and the state as it was.

        The large arrays never pass through a conditional, which would copy
        them: selections fuse into the operations that make the arrays.
        """
        count = state.count + 1
        new = {name: curvature.factors[name] for name in state.factors}
        usable = all_finite((gradient, curvature.value, new))
        # The factors' average, and their damped inverses at γ.
        average = moving_average(state.factors, new, count, self.decay)
        factors = keep_if(usable, average, state.factors)
        before = [push(curvature, state.previous)] if self.momentum else []

        def best_along(inverses: Named, gamma: Array) -> tuple[list[Direction], Step]:
            # The direction, and the step by the quadratic model of the full matrix.
            direction = self.preconditioner.apply(inverses, gamma + self.l2, gradient)
            directions = [push(curvature, direction), *before]
            return directions, best_step(curvature, directions, state.step_damping + self.l2)

        gamma, inverses = self._invert(state, factors, best_along, usable)
        directions, best = best_along(inverses, gamma)
        step = combine(directions, best.coefficients)
        # The reduction ratio, where it is due or in doubt, and with it τ.
        verdict = self._judge(state, curvature, best, step, usable)
        good = usable & verdict.finite & all_finite((best, step))
        taken = good & ~verdict.refused
        step = jax.tree.map(lambda x: jnp.where(taken, x, jnp.zeros_like(x)), step)
        numbers = state._replace(factors={}, inverses={}, previous={})
        advanced = numbers._replace(
            count=count,
            factor_damping=gamma,
            refused=state.refused + verdict.refused.astype(jnp.int32),
            step_damping=verdict.damping,
            step_size=best.coefficients[0].astype(jnp.float32),
            momentum=best.coefficients[-1].astype(jnp.float32) * float(self.momentum),
            reduction_ratio=verdict.ratio,
        )
        skipped = numbers._replace(skipped=state.skipped + 1)
        failed = keep_if(usable, self._retreat(skipped), skipped)
        previous = keep_if(usable, step, state.previous) if self.momentum else {}
        state = keep_if(good, advanced, failed)
        return step, state._replace(factors=factors, inverses=inverses, previous=previous)

    def _invert(self, state, factors: Named, best_along, usable: Array) -> tuple[Array, Named]:
        """γ, and the inverses at it, refreshed where that is due.

        A loop of no turn, one, or k + 1: where γ is due its k candidates are tried,
        then the best is inverted for good. So inversions compile once.
        """
        rule = self.factor_damping
        candidates = rule.candidates(state.factor_damping, state.step_damping)
        k = len(candidates)
        refresh = usable & refresh_due(state.count, self.refresh_inverse_every)
        # Counted before the update, as refreshes are, so that both fall together.
        search = usable & (state.count > 0) & rule.due(state.count) if k > 1 else jnp.array(False)
        due = search | refresh
        parts = self.preconditioner.decompose(factors, state.inverses, due)
        first = jnp.where(due, candidates[0], state.factor_damping)

        def inverses_at(gamma: Array) -> Named:
            return self.preconditioner.invert(parts, gamma + self.l2)

        if k == 1:  # a loop of its own, with less in it to compile

            def once(_):
                return jnp.array(False), inverses_at(first)

            return first, jax.lax.while_loop(lambda c: c[0], once, (due, state.inverses))[1]
        turns = jnp.where(search, k + 1, jnp.where(refresh, 1, 0))
        infinite = jnp.asarray(jnp.inf, jnp.float32)

        def model_value(inverses: Named, gamma: Array) -> Array:
            value = best_along(inverses, gamma)[1].predicted.astype(jnp.float32)
            return jnp.where(jnp.isfinite(value), value, jnp.inf)

        def turn(carry):
            i, least, gamma, _ = carry
            last = i == turns - 1
            tried = jnp.where(last, gamma, candidates[jnp.minimum(i, k - 1)])
            inverses = inverses_at(tried)
            value = jax.lax.cond(last, lambda *_: infinite, model_value, inverses, tried)
            better = value < least
            gamma = jnp.where(better, tried, gamma)
            return i + 1, jnp.where(better, value, least), gamma, inverses

        start = (jnp.zeros((), jnp.int32), infinite, first, state.inverses)
        *_, gamma, inverses = jax.lax.while_loop(lambda carry: carry[0] < turns, turn, start)
        return gamma, inverses

    def _judge(
        self, state: ScaleByCurvatureState, curvature: Curvature, best: Step, step: Named,
        usable: Array,
    ) -> _Verdict:  # fmt: skip
        """Measures the step where its turn has come, or where it extrapolates.

        The previous step is a good second direction as long as it is followed:
        a coefficient from 0 to 1. Beyond, or against it, the model extrapolates
        along a direction that the factors did not choose, often after a step
        that was nearly nothing; where training leaves a plateau such steps can
        undo all of it. So they are measured whenever they come up, and refused
        where the objective rises. Measuring every step instead costs more and
        refuses steps that batches make up for.
        """
        tau, due, doubtful = (
            state.step_damping,
            self.step_damping.due(state.count + 1),
            best.extrapolates,
        )

        def measure() -> _Verdict:
            rise = curvature.displaced(jax.tree.map(jnp.negative, step)) - curvature.value
            ratio = (rise / best.predicted).astype(jnp.float32)
            # The mean over the batch is not known better than that.
            roundoff = 8 * jnp.finfo(rise.dtype).eps * jnp.abs(curvature.value)
            refused = doubtful & (rise > roundoff)
            judged = jnp.where(refused, -jnp.inf, ratio)  # the worst of ratios
            adapted = self.step_damping.adapted(tau, judged)
            adapted = jnp.where(due | refused, adapted, tau)
            return _Verdict(ratio, adapted, jnp.isfinite(rise), refused)

        def keep() -> _Verdict:
            return _Verdict(state.reduction_ratio, tau, jnp.array(True), jnp.array(False))

        return jax.lax.cond(usable & (due | doubtful), measure, keep)

    def _retreat(self, state: ScaleByCurvatureState) -> ScaleByCurvatureState:
        """Stronger damping after a step whose numbers were not finite.

        The factors were finite, so it was their inversion, or the model along
        the step, that failed: retrying at the same dampings would fail again.
        """
        return state._replace(
            count=jnp.zeros_like(state.count),  # refresh the inverses at once
            factor_damping=self.factor_damping.raised(state.factor_damping),
            step_damping=self.step_damping.raised(state.step_damping),
        )
