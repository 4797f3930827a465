"""γ by the quadratic model."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kfgn.base.types import Array
from kfgn.optimizers.damping.rule import FactorDamping


@dataclasses.dataclass(frozen=True)
class Greedy(FactorDamping):
    """γ is the best of `{γ, ωγ, γ/ω}` by the full quadratic model (appendix C.3.2).

    >>> import jax.numpy as jnp, kfgn
    >>> rule = kfgn.transforms.Greedy(1.0, period=1, decay=0.5)
    >>> rule.candidates(jnp.array(1.0), jnp.array(3.0)).tolist()
    [1.0, 0.5, 2.0]
    """

    period: Any = 20

    def candidates(self, value: Array, step_damping: Array) -> Array:
        """`[γ, ωγ, γ/ω]` within the bounds."""
        del step_damping
        factor = jnp.asarray(self.factor, value.dtype)
        return self.clip(value * jnp.stack([jnp.ones_like(factor), factor, 1 / factor]))
