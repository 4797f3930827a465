"""The preconditioner: moving averages of factors, damped inverses, directions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.blocks import Blocks
from kfgn.curvature import Factors
from kfgn.errors import OptionError
from kfgn.kronecker import (
    Eigen,
    FactoredInverse,
    apply_eigen,
    apply_factored,
    eigen,
    factored_inverses,
)
from kfgn.layer import Layer
from kfgn.linalg import factor_dtype

Array = jax.Array
Named = dict[str, Any]

INVERSES = ("factored", "eigen")


def moving_average(old: Named, new: Named, count: Array, decay: Any) -> Named:
    """`β old + (1 - β) new` with `β = min(decay, 1 - 1/count)`; decay None keeps `new`.

    With this β the average of the first updates is the plain mean.
    """
    if decay is None:
        return new

    def average(a, b):
        beta = jnp.minimum(decay, 1 - 1 / count).astype(a.dtype)
        return b.astype(a.dtype) + beta * (a - b.astype(a.dtype))

    return jax.tree.map(average, old, new)


def all_finite(tree: Any) -> Array:
    """Whether every entry of a pytree is finite, a scalar.

    Row sums of matrices are taken by a product: nothing that is not finite
    survives a sum, and a product needs no code of its own compiled per shape.
    """
    sums = []
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim == 2:
            leaf = leaf @ jnp.ones((leaf.shape[1], 2), leaf.dtype)
        sums.append(leaf.ravel().astype(jnp.float32))
    return jnp.all(jnp.isfinite(jnp.concatenate(sums))) if sums else jnp.array(True)


@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """How directions `C^-1 g` are made from factors, for a fixed set of layers.

    Args:
      blocks: all layers of the objective.
      inverse: "factored" (eq. 36, Cholesky) or "eigen" (eq. 35, exact).
    """

    blocks: Blocks
    inverse: str = "factored"

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Blocks):
            raise OptionError(
                "layers must be what kfgn.layers(objective, params, batch) returned, found a "
                f"{type(self.blocks).__name__}"
            )
        if self.inverse not in INVERSES:
            raise OptionError(
                f"inverse must be one of {', '.join(INVERSES)}, found {self.inverse!r}"
            )

    def init(self, leaves: Named) -> tuple[Named, Named]:
        """Zero factors, and inverses of the right shapes, for the layers among the leaves."""
        factors: Named = {}
        inverses: Named = {}
        for name, layer in self.blocks.present(leaves).items():
            dtype = factor_dtype(*(leaves[p].dtype for p in layer.parameters))
            q = jnp.zeros((layer.activation_size,) * 2, dtype)
            g = jnp.zeros((layer.d_out,) * 2, dtype)
            factors[name] = Factors(q, g)
            if self.inverse == "factored":
                inverses[name] = FactoredInverse(jnp.zeros_like(q), jnp.zeros_like(g))
            else:
                inverses[name] = Eigen(q[0], jnp.zeros_like(q), g[0], jnp.zeros_like(g))
        return factors, inverses

    def decompose(self, factors: Named, old: Named, due: Array) -> Named:
        """What does not depend on the damping, recomputed where it is due."""
        if self.inverse == "factored":
            return factors
        return jax.lax.cond(due, lambda: {n: eigen(*f) for n, f in factors.items()}, lambda: old)

    def invert(self, decomposed: Named, damping: Array) -> Named:
        """The inverses at a damping, from what `decompose` gave."""
        if self.inverse == "eigen":
            return decomposed
        return factored_inverses(decomposed, damping)

    def apply(self, inverses: Named, damping: Array, gradient: Named) -> Named:
        """The direction `C^-1 g` for every leaf; those without a block get `g / damping`."""
        direction: Named = {}
        for name, inverse in inverses.items():
            layer: Layer = self.blocks.layers[name]
            matrix = layer.to_matrix(gradient)
            matrix = matrix.astype(jax.tree.leaves(inverse)[0].dtype)
            if self.inverse == "factored":
                solved = apply_factored(inverse, matrix)
            else:
                solved = apply_eigen(inverse, damping.astype(matrix.dtype), matrix)
            direction.update(layer.from_matrix(solved))
        for name, leaf in gradient.items():
            if name not in direction:
                direction[name] = leaf / damping.astype(leaf.dtype)
        return direction
