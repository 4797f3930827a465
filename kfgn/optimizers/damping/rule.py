"""What damping rules have in common: settings, and the two roles that a rule may have."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

from kfgn.base.checks import (
    check_fraction,
    check_not_negative,
    check_positive,
    check_whole,
    in_order,
)
from kfgn.base.errors import OptionError
from kfgn.base.types import Array, Number

Rule = TypeVar("Rule", bound="Damping")


@dataclasses.dataclass(frozen=True)
class Damping:
    """How a damping starts, is bounded, and when it adapts; the base of all rules.

    Args:
      initial: the value to start from.
      minimum, maximum: its bounds.
      period: updates between adaptions; 0 for never.
      decay: an adaption multiplies or divides by `ω = decay^period` (appendix C.3).

    >>> import kfgn
    >>> round(kfgn.transforms.LevenbergMarquardt(2.0, period=2, decay=0.9).factor, 2)
    0.81
    """

    initial: Number
    minimum: Number = 1e-9
    maximum: Number = 1e6
    period: Any = 5
    decay: Number = 0.95

    @property
    def adapts(self) -> bool:
        """Whether it ever changes by evidence."""
        return not (isinstance(self.period, int) and self.period == 0)

    @property
    def least(self) -> Number:
        """The smallest value that it may take."""
        return self.minimum

    @property
    def factor(self) -> Number:
        """ω, below 1."""
        return self.decay**self.period

    def due(self, count: Array) -> Array:
        """Whether update number `count` is one that adapts."""
        return count % self.period == 0 if self.adapts else jnp.array(False)

    def clip(self, value: Array) -> Array:
        """The value within the bounds."""
        return jnp.clip(value, self.minimum, self.maximum)

    def raised(self, value: Array) -> Array:
        """The value after an update that failed, whose repetition would fail again."""
        return self.clip(10 * value)

    def check(self, name: str) -> None:
        """Raises OptionError where settings make no sense."""
        check_not_negative(f"{name}: initial", self.initial)
        check_not_negative(f"{name}: minimum", self.minimum)
        check_positive(f"{name}: maximum", self.maximum)
        check_whole(f"{name}: period", self.period, 0, traced=True)
        check_fraction(f"{name}: decay", self.decay)
        if not in_order(self.minimum, self.initial, self.maximum):
            raise OptionError(
                f"{name} must start within its bounds, minimum <= initial <= maximum; found "
                f"minimum {self.minimum}, initial {self.initial}, maximum {self.maximum}"
            )


class StepDamping(Damping):
    """A rule for τ, the damping of the quadratic model and of conjugate gradients.

    >>> class Halving(StepDamping):
    ...     def adapted(self, value, ratio):
    ...         return self.clip(value / 2)
    >>> float(Halving(1.0).adapted(jnp.array(1.0), jnp.array(0.9)))
    0.5
    """

    def adapted(self, value: Array, ratio: Array) -> Array:
        """The next value, by the reduction ratio ρ of eq. (42) at an update that is due."""
        raise NotImplementedError

    def judged(self, ratio: Array, agreement: Array) -> Array:
        """ρ as `adapted` is given it; a rule may lower it where the next batches disagree.

        `agreement` is the part of a step that they would have taken, on average of some ten
        updates; 1 where that is not known, as without momentum.
        """
        del agreement
        return ratio


class FactorDamping(Damping):
    """A rule for γ, the damping of the Kronecker factors.

    >>> class Tenth(FactorDamping):
    ...     def candidates(self, value, step_damping):
    ...         return step_damping[None] / 10
    >>> Tenth(1.0).candidates(jnp.array(1.0), jnp.array(5.0)).tolist()
    [0.5]
    """

    def candidates(self, value: Array, step_damping: Array) -> Array:
        """What γ may become, `[k]`: the first where no search is due, else the model's best.

        The choice is made at updates that are due, by the quadratic model's
        value at its minimum; the first is taken wherever inverses are refreshed.
        """
        raise NotImplementedError

    def beside(self, step_damping: Damping) -> "FactorDamping":
        """This rule where τ has that one."""
        del step_damping
        return self


def as_rule(name: str, value: Any, role: type[Rule], of_number: Callable[[Any], Damping]) -> Rule:
    """A rule of a role, checked; a number is the start of the rule `of_number`."""
    if not isinstance(value, Damping):
        check_not_negative(name, value)
        value = of_number(value)
    if not isinstance(value, role):
        raise OptionError(
            f"{name} must be a number or a kfgn.transforms.{role.__name__}, found {value!r}"
        )
    value.check(name)
    return value
