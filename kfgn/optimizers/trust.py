"""Whether the quadratic model's step can be trusted: ρ, measured where that is due or in doubt.

The previous step is a good second direction as long as it is followed: a
coefficient from 0 to 1. Beyond, or against it, the model extrapolates along a
direction that the factors did not choose, often after a step that was nearly
nothing; where training leaves a plateau such steps can undo all of it. So they
are measured whenever they come up, and refused where the objective rises.
Measuring every step instead costs more and refuses steps that batches make up for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfgn.curvature.batch import Curvature
from kfgn.optimizers.damping import Damping, levenberg_marquardt
from kfgn.optimizers.quadratic_model import Step

Array = jax.Array
Named = dict[str, Any]


class Verdict(NamedTuple):
    """What measuring a step found, or what was known before where it was not measured."""

    ratio: Array  # ρ, eq. (42)
    damping: Array  # τ for the next update
    finite: Array  # false where the objective after the step was found not to be
    refused: Array  # the step extrapolates, and the objective would rise


def extrapolates(step: Step) -> Array:
    """Whether the coefficient of the previous step, if there is one, is outside [0, 1]."""
    if len(step.coefficients) == 1:
        return jnp.array(False)
    return (step.coefficients[1] < 0) | (step.coefficients[1] > 1)


def judge(
    curvature: Curvature,
    step: Step,
    moved: Named,
    known: tuple[Array, Array],
    step_damping: Damping,
    thresholds: tuple[float, float],
    due: Array,
    usable: Array,
) -> Verdict:
    """Measures the step where its turn has come (`due`) or where it extrapolates.

    Args:
      curvature: the batch's, for the objective before and after the step.
      step, moved: the quadratic model's minimum and the step itself, to be
        subtracted from the parameters.
      known: the last ρ and τ.
      step_damping, thresholds: how τ adapts (appendix C.3.1): where it is due,
        and upwards where a step is refused.
      due, usable: nothing is measured for a batch that is not usable.
    """
    doubtful = extrapolates(step)
    ratio, tau = known

    def measure():
        rise = curvature.displaced(jax.tree.map(jnp.negative, moved)) - curvature.value
        found = (rise / step.predicted).astype(jnp.float32)
        # The mean over the batch is not known better than that.
        roundoff = 8 * jnp.finfo(rise.dtype).eps * jnp.abs(curvature.value)
        refused = doubtful & (rise > roundoff)
        judged = jnp.where(refused, -jnp.inf, found)  # the worst of ratios
        adapted = levenberg_marquardt(step_damping, tau, judged, *thresholds)
        adapted = jnp.where(due | refused, adapted, tau)
        return Verdict(found, adapted, jnp.isfinite(rise), refused)

    def keep():
        return Verdict(ratio, tau, jnp.array(True), jnp.array(False))

    return jax.lax.cond(usable & (due | doubtful), measure, keep)
