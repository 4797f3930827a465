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

    >>> import jax.numpy as jnp, kfgn
    >>> rule = kfgn.transforms.LevenbergMarquardt(1.0, period=1, decay=0.5)
    >>> [float(rule.adapted(jnp.array(1.0), jnp.array(ratio))) for ratio in (0.1, 0.5, 0.9)]
    [2.0, 1.0, 0.5]
    """

    decay: Number = 0.97
    thresholds: tuple[Number, Number] = (0.25, 0.75)

    def adapted(self, value: Array, ratio: Array) -> Array:
        """The value times ω, as it is, or over ω."""
        low, high = self.thresholds
        factor = jnp.asarray(self.factor, value.dtype)
        lower = jnp.where(ratio > high, value * factor, value)
        return self.clip(jnp.where(ratio >= low, lower, value / factor))

    def check(self, name: str) -> None:
        """Raises OptionError where settings make no sense."""
        super().check(name)
        check_pair(f"{name}: thresholds", self.thresholds)
