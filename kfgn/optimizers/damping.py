"""Adaptive damping: Levenberg-Marquardt for τ, and the settings of both dampings."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.checks import (
    check_fraction,
    check_not_negative,
    check_positive,
    check_whole,
    in_order,
)
from kfgn.base.errors import OptionError

Array = jax.Array


class Damping(NamedTuple):
    """How one damping starts, is bounded, and adapts (appendix C.3).

    Every `period` updates it may be multiplied or divided by `decay^period`.
    A period of 0 keeps it fixed.
    """

    initial: float
    minimum: float
    maximum: float
    period: int
    decay: float = 0.95

    @property
    def factor(self) -> Any:
        """ω of appendix C.3, below 1."""
        return self.decay**self.period

    def clip(self, value: Array) -> Array:
        """The value within the bounds."""
        return jnp.clip(value, self.minimum, self.maximum)

    def due(self, count: Array) -> Array:
        """Whether update number `count` (from 1) is one that adapts."""
        if isinstance(self.period, int) and self.period == 0:
            return jnp.array(False)
        return count % self.period == 0


def levenberg_marquardt(
    damping: Damping, value: Array, ratio: Array, low: float, high: float
) -> Array:
    """Less damping where the model is trustworthy, more where it is not.

    `ratio` is the reduction ratio ρ of eq. (42): above `high` the damping is
    multiplied by ω, below `low`, or where ρ is not a number, divided by it.
    """
    factor = jnp.asarray(damping.factor, value.dtype)
    lower = jnp.where(ratio > high, value * factor, value)
    return damping.clip(jnp.where(ratio >= low, lower, value / factor))


def check_damping(name: str, damping: Any) -> None:
    """Raises OptionError where settings make no sense."""
    if not isinstance(damping, Damping):
        raise OptionError(
            f"{name} must be a kfgn.transforms.Damping(initial, minimum, maximum, period), "
            f"found {damping!r}"
        )
    initial, minimum, maximum, period, decay = damping
    check_not_negative(f"{name}: initial", initial)
    check_not_negative(f"{name}: minimum", minimum)
    check_positive(f"{name}: maximum", maximum)
    check_whole(f"{name}: period", period, 0, traced=True)
    check_fraction(f"{name}: decay", decay)
    if not in_order(minimum, initial, maximum):
        raise OptionError(
            f"{name} must start within its bounds, minimum <= initial <= maximum; found "
            f"minimum {minimum}, initial {initial}, maximum {maximum}"
        )
