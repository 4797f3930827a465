"""The preconditioner: moving averages of factors, damped inverses, directions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_choice
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
from kfgn.base.types import Array, Named, Number
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.optimizers.layer_blocks import LayerBlocks

INVERSES = ("factored", "eigen")


def moving_average(old: Named, new: Named, count: Array, decay: Number | None) -> Named:
    """`β old + (1 - β) new` with `β = min(decay, 1 - 1/count)`; decay None keeps `new`.

    With this β the average of the first updates is the plain mean.
    """
    if decay is None:
        return new

    def average(a, b):
        beta = jnp.minimum(decay, 1 - 1 / count).astype(a.dtype)
        return b.astype(a.dtype) + beta * (a - b.astype(a.dtype))

    return jax.tree.map(average, old, new)


def refresh_due(count: Array, every: Number) -> Array:
    """Whether to invert after `count` updates: every so often, and always at the start.

    The moving average moves fastest at the start, so the first `every` updates
    each get fresh inverses.
    """
    return (count % every == 0) | (count < every)


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
                "blocks must be what kfgn.layers.find_blocks(objective, params, batch) returned, "
                f"found a {type(self.blocks).__name__}"
            )
        check_choice("inverse", self.inverse, INVERSES)

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
                values, leaf = inverse.diagonal, gradient[name]
                if self.inverse == "eigen":
                    values = 1 / (values + damping.astype(values.dtype))
                direction[name] = (values * leaf.astype(values.dtype)).astype(leaf.dtype)
                continue
            layer = self.blocks.layers[name]
            matrix = layer.to_matrix(gradient)
            matrix = matrix.astype(jax.tree.leaves(inverse)[0].dtype)
            if self.inverse == "factored":
                solved = apply_factored(inverse, matrix)
            else:
                solved = apply_eigen(inverse, damping.astype(matrix.dtype), matrix)
            direction.update(layer.from_matrix(solved))
        others = {n: leaf for n, leaf in gradient.items() if n not in direction}
        return direction | {n: leaf / damping.astype(leaf.dtype) for n, leaf in others.items()}
