"""The preconditioner: moving averages of factors, damped inverses, directions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import OptionError
from kfgn.base.kronecker import (
    Eigen,
    FactoredInverse,
    apply_eigen,
    apply_factored,
    eigen,
    factored_inverses,
)
from kfgn.base.linalg import factor_dtype
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.model.layer import Layer
from kfgn.optimizers.layer_blocks import LayerBlocks

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

    blocks: LayerBlocks
    inverse: str = "factored"

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, LayerBlocks):
            raise OptionError(
                "layers must be what kfgn.layers.find_blocks(objective, params, batch) returned, "
                f"found a {type(self.blocks).__name__}"
            )
        if self.inverse not in INVERSES:
            raise OptionError(
                f"inverse must be one of {', '.join(INVERSES)}, found {self.inverse!r}"
            )

    def init(self, leaves: Named) -> tuple[Named, Named]:
        """Zero factors, and inverses of the right shapes, for what is among the leaves."""
        factors: Named = {}
        inverses: Named = {}
        for name, layer in self.blocks.present(leaves).items():
            dtype = factor_dtype(*(leaves[p].dtype for p in layer.parameters))
            q = jnp.zeros(layer.activation_shape, dtype)
            g = jnp.zeros(layer.pre_activation_shape, dtype)
            factors[name] = Factors(q, g)
            if self.inverse == "factored":
                inverses[name] = FactoredInverse(jnp.zeros_like(q), jnp.zeros_like(g))
            else:
                vectors = None if layer.indexed else jnp.zeros_like(q)
                values = q if layer.indexed else q[..., 0]
                inverses[name] = Eigen(
                    jnp.zeros_like(values), vectors, g[..., 0], jnp.zeros_like(g)
                )
        for name in self.blocks.diagonals(leaves):
            zeros = jnp.zeros(leaves[name].shape, factor_dtype(leaves[name].dtype))
            factors[name] = Diagonal(zeros)
            inverses[name] = Diagonal(jnp.zeros_like(zeros))
        return factors, inverses

    def decompose(self, factors: Named, old: Named, due: Array) -> Named:
        """What does not depend on the damping, recomputed where it is due."""
        if self.inverse == "factored":
            return factors

        def new():
            return {n: eigen(*f) if isinstance(f, Factors) else f for n, f in factors.items()}

        return jax.lax.cond(due, new, lambda: old)

    def invert(self, decomposed: Named, damping: Array) -> Named:
        """The inverses at a damping, from what `decompose` gave."""
        if self.inverse == "eigen":
            return decomposed
        kronecker = {n: f for n, f in decomposed.items() if isinstance(f, Factors)}
        inverses: Named = factored_inverses(kronecker, damping)
        for name, found in decomposed.items():
            if isinstance(found, Diagonal):
                diagonal = found.diagonal
                inverses[name] = Diagonal(1 / (diagonal + damping.astype(diagonal.dtype)))
        return inverses

    def apply(self, inverses: Named, damping: Array, gradient: Named) -> Named:
        """The direction `C^-1 g` for every leaf; those without curvature get `g / damping`."""
        direction: Named = {}
        for name, inverse in inverses.items():
            if isinstance(inverse, Diagonal):
                direction[name] = self._apply_diagonal(inverse, damping, gradient[name])
                continue
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

    def _apply_diagonal(self, inverse: Diagonal, damping: Array, gradient: Array) -> Array:
        values = inverse.diagonal
        if self.inverse == "eigen":
            values = 1 / (values + damping.astype(values.dtype))
        return (values * gradient.astype(values.dtype)).astype(gradient.dtype)
