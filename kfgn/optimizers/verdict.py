"""Whether a step is taken: what measuring the objective after it says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.types import Named, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.damping import StepDamping
from kfgn.optimizers.quadratic_model import Step
from kfgn.optimizers.state import Count, Flag, number, zero_unless

#: Steps that raise the objective are cut to a quarter until they are too short to matter.
_CUT, _LEAST = 0.25, 0.25**10


class Verdict(NamedTuple):
    """What measuring a step found, or what was known before where it was not measured."""

    ratio: Scalar  # ρ, eq. (42)
    damping: Scalar  # τ for the next update
    predicted: Scalar
    actual: Scalar
    finite: Flag  # false where the objective after the step was found not to be
    share: Scalar  # of the step, that is taken: 0 where it is refused


def judge(
    rule: StepDamping,
    count: Count,
    before: Verdict,
    curvature: Curvature,
    best: Step,
    step: Named,
    fine: Flag,
    agreement: Scalar,
) -> tuple[Verdict, Named]:
    """Measures the step where its turn has come, where it extrapolates, or is a first one.

    The previous step is a good second direction as long as it is followed:
    a coefficient from 0 to 1. Beyond, or against it, the model extrapolates
    along a direction that the factors did not choose, often after a step
    that was nearly nothing; where training leaves a plateau such steps can
    undo all of it. So they are measured whenever they come up, and refused
    where the objective rises. Measuring every step instead costs more and
    refuses steps that batches make up for.

    Where the model has no curvature, as behind the bend of a Huber loss, nothing but τ
    bounds a step. One that is measured and raises the objective by more than was promised
    as its fall, or than its size, is cut until the objective falls. After a rise the next steps
    are measured too, and those that promise more than there is, as where a loss is saturated.

    Args:
      rule: of τ.
      count: updates made.
      before: what is known.
      curvature: of the batch.
      best: the step by the quadratic model.
      step: the same by parameter name, to be subtracted.
      fine: whether the batch is usable, and all that is known of the step finite.
      agreement: of batches with the steps before them.

    Returns:
      The verdict, and its share of the step. A loop of no turn or one made both: what passes
      through it is not copied.
    """
    doubtful = best.extrapolates
    due = rule.due(count + 1) & (best.predicted != 0)
    size = jnp.abs(curvature.value)
    promised = -best.predicted.astype(size.dtype)
    wary = (count == 0) | ~(before.ratio >= 0) | (promised > size)
    # The mean over the batch is not known better than that.
    roundoff = 8 * jnp.finfo(size.dtype).eps * size

    def is_fine(share: Scalar, rise: Scalar) -> Flag:
        allowed = jnp.where((share == 1) & ~doubtful, jnp.minimum(promised, size), 0)
        return rise <= allowed + roundoff

    def goes_on(carry: tuple[Scalar, Scalar, Scalar]) -> Flag:
        share, rise, _ = carry
        return (share > 1) | (~is_fine(share, rise) & ~doubtful & (share > _LEAST))

    def measure(carry: tuple[Flag, Verdict, Named]) -> tuple[Flag, Verdict, Named]:
        step = carry[2]

        def turn(carry: tuple[Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar]:
            longer, _, first = carry
            share = _CUT * longer
            moved = jax.tree.map(lambda x: -share.astype(x.dtype) * x, step)
            rise = curvature.displaced(moved) - curvature.value
            return share, rise, jnp.where(share == 1, rise, first)

        unknown = jnp.full_like(roundoff, jnp.inf)
        start = number(1 / _CUT), unknown, unknown
        share, rise, first = jax.lax.while_loop(goes_on, turn, start)
        share = jnp.where(is_fine(share, rise), share, 0)
        ratio = (first / best.predicted).astype(jnp.float32)
        judged = jnp.where(share == 0, -jnp.inf, ratio)  # the worst of ratios
        adapted = rule.adapted(before.damping, rule.judged(judged, agreement))
        adapted = jnp.where(due | (share < 1), adapted, before.damping)
        predicted, actual = (x.astype(jnp.float32) for x in (best.predicted, first))
        finite = jnp.isfinite(rise)
        verdict = Verdict(ratio, adapted, predicted, actual, finite, share)
        taken = jax.tree.map(lambda x: share.astype(x.dtype) * x, step)
        return jnp.array(False), verdict, zero_unless(finite & (share > 0), taken)

    start = fine & (due | doubtful | wary), before, step
    return jax.lax.while_loop(lambda carry: carry[0], measure, start)[1:]
