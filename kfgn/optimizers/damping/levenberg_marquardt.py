"""τ by the reduction ratio."""

import dataclasses

import jax.numpy as jnp

from kfgn.base.checks import check_pair
from kfgn.base.types import Array, Number
from kfgn.optimizers.damping.rule import StepDamping


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(StepDamping):
    """Less damping where the model is trustworthy, more where it is not (appendix C.3.1).

    With the reduction ratio ρ of eq. (42) and `ω = decay^period`, the damping
    is multiplied by ω where `ρ > thresholds[1]`, and divided by it where
    `ρ < thresholds[0]` or ρ is not a number. The paper prints 0.75 for both
    thresholds; Martens & Grosse (2015), section 6.5, have 1/4 and 3/4.

    ρ is measured on the batch that chose the step. Beyond the papers, the damping does not fall
    while the next batches would have taken less than `agreement[1]` of the steps, and rises
    where that is less than `agreement[0]`: else it falls for ever where every step fits its own
    batch. `agreement=None` leaves it to ρ alone.

    >>> import jax.numpy as jnp, kfgn
    >>> rule = kfgn.transforms.LevenbergMarquardt(1.0, period=1, decay=0.5)
    >>> [float(rule.adapted(jnp.array(1.0), jnp.array(ratio))) for ratio in (0.1, 0.5, 0.9)]
    [2.0, 1.0, 0.5]
    >>> [float(rule.judged(jnp.array(0.9), agreement)) for agreement in (0.1, 0.55, 0.9)]
    [-inf, 0.75, 0.8999999761581421]
    """

    decay: Number = 0.97
    thresholds: tuple[Number, Number] = (0.25, 0.75)
    agreement: tuple[Number, Number] | None = (0.5, 0.6)

    def adapted(self, value: Array, ratio: Array) -> Array:
        """The value times ω, as it is, or over ω."""
        low, high = self.thresholds
        factor = jnp.asarray(self.factor, value.dtype)
        lower = jnp.where(ratio > high, value * factor, value)
        return self.clip(jnp.where(ratio >= low, lower, value / factor))

    def judged(self, ratio: Array, agreement: Array) -> Array:
        """ρ, too small to lower the damping, or the worst, where the next batches disagree."""
        if self.agreement is None:
            return ratio
        least, enough = self.agreement
        held = jnp.minimum(ratio, jnp.asarray(self.thresholds[1], ratio.dtype))
        return jnp.where(agreement < least, -jnp.inf, jnp.where(agreement > enough, ratio, held))

    def check(self, name: str) -> None:
        """Raises OptionError where settings make no sense."""
        super().check(name)
        check_pair(f"{name}: thresholds", self.thresholds)
        if self.agreement is not None:
            check_pair(f"{name}: agreement", self.agreement)
