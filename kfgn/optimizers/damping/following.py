"""γ = τ."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kfgn.base.types import Array
from kfgn.optimizers.damping.rule import Damping, FactorDamping


@dataclasses.dataclass(frozen=True)
class Following(FactorDamping):
    """γ is τ, whenever inverses are refreshed, as in Martens & Grosse (2015) at the start.

    >>> import jax.numpy as jnp, kfgn
    >>> kfgn.transforms.Following().candidates(jnp.array(3.0), jnp.array(2.0)).tolist()
    [2.0]
    """

    initial: Any = None  # τ's, as are the bounds
    period: Any = 0

    def candidates(self, value: Array, step_damping: Array) -> Array:
        """τ alone."""
        del value
        return jnp.stack([step_damping])

    def beside(self, step_damping: Damping) -> "Following":
        """With the start and the bounds of τ."""
        return Following(step_damping.initial, step_damping.least, step_damping.maximum)

    def check(self, name: str) -> None:
        """There is nothing to check: all is τ's."""
