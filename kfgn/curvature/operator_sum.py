"""The exact matrices of a sum of objectives: the sums of those of its terms."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_flag, check_size
from kfgn.base.errors import OptionError
from kfgn.base.linalg import total
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, Batch, Number, PyTree
from kfgn.curvature.blocks import Block, blocks_of, split_block, split_matvec
from kfgn.curvature.operator import REMEDY_OF_BLOCKS, Operator, in_block
from kfgn.model.graph.unite import unite
from kfgn.objective.sum_of import SumOfObjectives, named_term


@dataclasses.dataclass(frozen=True)
class OperatorSum(Operator):
    """`sum_i c_i A_i`, by the verbs of `Operator` that do not look at single examples.

    Blocks are those of the sum's layers, column by column, as the layers of the terms may differ.
    """

    objective: SumOfObjectives  # type: ignore[assignment]
    kind: type[Operator]

    def matvec(
        self,
        params: PyTree,
        batch: Batch,
        v: PyTree,
        *,
        with_l2: bool = False,
        chunk_size: int | None = None,
    ) -> PyTree:
        check_flag("with_l2", with_l2)
        return self._sum(
            batch,
            lambda part, own: part.matvec(params, own, v, with_l2=with_l2, chunk_size=chunk_size),
        )

    def dense(self, params: PyTree, batch: Batch, *, with_l2: bool = False) -> Float[Array, "P P"]:
        return self._sum(batch, lambda part, own: part.dense(params, own, with_l2=with_l2))

    def diagonal_by_parameter(self, params: PyTree, batch: Batch) -> PyTree:
        return self._sum(batch, lambda part, own: part.diagonal_by_parameter(params, own))

    def diagonal(
        self, params: PyTree, batch: Batch, *, chunk_size: int | None = 1
    ) -> dict[str, Float[Array, "*shape"]]:
        def of(part: Operator, own: Batch) -> PyTree:
            return part.diagonal_by_parameter(params, own)

        leaves = named_leaves(self._sum(batch, of))
        blocks = blocks_of(unite(self.objective, params, batch))
        return {name: block.to_matrix(leaves) for name, block in blocks.items()}

    def blocks(
        self, params: PyTree, batch: Batch, *, per_example: bool = False, split_bias: bool = False
    ) -> dict[str, Any]:
        blocks = blocks_of(unite(self.objective, params, batch))
        dtype, found = jnp.result_type(*jax.tree.leaves(params)), {}
        for name, matvec in self.block_matvecs(params, batch, per_example=per_example).items():
            block = blocks[name]
            slots, shape = block.kernels, block.matrix_shape
            side = math.prod(shape) // slots
            check_size(f"the block of {name!r}", (slots, side, side), dtype, REMEDY_OF_BLOCKS)
            units = jnp.tile(jnp.eye(side, dtype=dtype)[:, None], (1, slots, 1))
            columns = jax.lax.map(matvec, units.reshape(-1, *shape)).reshape(side, slots, side)
            matrix = jnp.moveaxis(columns, 0, -1)
            matrix = matrix if slots > 1 else matrix[0]
            found[name] = split_block(matrix, block) if split_bias else matrix
        return found

    def block_matvecs(
        self, params: PyTree, batch: Batch, *, per_example: bool = False, split_bias: bool = False
    ) -> dict[str, Any]:
        if per_example:
            raise self._refusal("blocks of every example")
        check_flag("split_bias", split_bias)
        blocks = blocks_of(unite(self.objective, params, batch))

        def product(v: PyTree) -> PyTree:
            return self.matvec(params, batch, v)

        def matvec_of(block: Block) -> Callable[..., Any]:
            def matvec(matrix: Array) -> Array:
                return in_block(product, params, block, matrix)

            return split_matvec(matvec, block) if split_bias else matvec

        return {name: matvec_of(block) for name, block in blocks.items()}

    def pre_activation(self, params: PyTree, batch: Batch, **_: Any) -> dict[str, Array]:
        raise self._refusal("matrices in pre-activations")

    def output(self, params: PyTree, batch: Batch) -> Array:
        raise self._refusal("matrices in outputs")

    def _parts(self, batch: Batch) -> Iterator[tuple[str, Number, Operator, Batch]]:
        for name, own in self.objective.batches(batch).items():
            part = self.kind(self.objective.terms[name])
            yield name, self.objective.weights[name], part, own

    def _sum(self, batch: Batch, of: Callable[[Operator, Batch], PyTree]) -> PyTree:
        parts = []
        for name, weight, part, own in self._parts(batch):
            with named_term(name):
                parts.append((weight, of(part, own)))
        return _weighted(parts)

    def _refusal(self, what: str) -> OptionError:
        return OptionError(
            f"a sum of objectives has no {what} of its own: ask its terms one by one, "
            f"as operator(objective.terms[{next(iter(self.objective.terms))!r}])"
        )


def _weighted(parts: list[tuple[Number, PyTree]]) -> PyTree:
    """`sum_i c_i x_i` of pytrees alike."""
    weights, trees = zip(*parts, strict=True)

    def add(*leaves: Array) -> Array:
        pairs = zip(weights, leaves, strict=True)
        return total(jnp.asarray(c).astype(x.dtype) * x for c, x in pairs)

    return jax.tree.map(add, *trees)
