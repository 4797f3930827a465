"""A damping that stays as it is."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kfgn.base.types import Array, Number
from kfgn.optimizers.damping.rule import FactorDamping, StepDamping


@dataclasses.dataclass(frozen=True)
class Fixed(StepDamping, FactorDamping):
    """A damping that no evidence changes; only an update that failed raises it tenfold.

    >>> import kfgn
    >>> kfgn.transforms.Fixed(0.1).adapts
    False
    """

    minimum: Number = 0.0
    maximum: Number = 1e10
    period: Any = 0

    @property
    def least(self) -> Number:
        """Where it starts."""
        return self.initial

    def adapted(self, value: Array, ratio: Array) -> Array:
        """The value as it is."""
        del ratio
        return value

    def candidates(self, value: Array, step_damping: Array) -> Array:
        """The value alone."""
        del step_damping
        return jnp.stack([value])
