"""Exact curvature: pre-activation matrices per example, blocks, diagonals.

All are curvature of the mean per-example loss, without the l2 term, whose
curvature is `l2` times the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import OptionError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.per_example import (
    Prepared,
    batch_size_of,
    free_matrices,
    in_shape,
    mean_over,
    prepare,
    shared_diagonal,
    single_diagonal,
    use_block,
)
from kfgn.curvature.products import gauss_newton_vector_product, hessian_vector_product
from kfgn.model.graph import build_graph
from kfgn.model.layer import Layer
from kfgn.objective.objective import Objective, check_batch

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]


def pre_activation_hessian(
    objective: Objective, *, reduce: str | None = None, chunk_size: int = 1
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """Each example's Hessian in every layer's pre-activation, eq. (8).

    Args:
      objective: the objective.
      reduce: None gives `[N, d_out, d_out]` per layer; "mean" gives the mean
        over the batch, `[d_out, d_out]`, in memory that does not grow with N.
      chunk_size: how many examples are worked on at once.
    """
    return _per_example(objective, True, reduce, chunk_size)


def pre_activation_gauss_newton(
    objective: Objective, *, reduce: str | None = None, chunk_size: int = 1
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """Each example's Gauss-Newton matrix in every layer's pre-activation, eq. (22).

    The arguments are those of `pre_activation_hessian`.
    """
    return _per_example(objective, False, reduce, chunk_size)


def block_hessian(
    objective: Objective, *, as_matvec: bool = False
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """The Hessian of the mean loss in every layer's parameters, eqs. (7)-(8).

    A block acts on the row-major vec of `[d_in + 1, d_out]` (kernel, then
    bias) and is `mean_n a_n a_n' ⊗ H_n`. With `as_matvec` it is a function of
    `[d_in + 1, d_out]` instead, which forms no matrix.
    """
    if as_matvec:
        return _block_matvecs(objective, hessian_vector_product)
    return _dense_blocks(objective, hessian=True)


def block_gauss_newton(
    objective: Objective, *, as_matvec: bool = False
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """The Gauss-Newton matrix in every layer's parameters, eqs. (16), (22).

    Layout and `as_matvec` are those of `block_hessian`.
    """
    if as_matvec:
        return _block_matvecs(objective, gauss_newton_vector_product)
    return _dense_blocks(objective, hessian=False)


def hessian_diagonal(
    objective: Objective, *, chunk_size: int = 1
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """The exact diagonal of the Hessian, `[d_in + 1, d_out]` per layer.

    `mean_n a_n^2 ⊗ diag(H_n)`: what lies above the first layers is formed as a
    diagonal only, so the recursion's largest product falls away.
    """
    return _diagonals(objective, True, chunk_size)


def gauss_newton_diagonal(
    objective: Objective, *, chunk_size: int = 1
) -> Callable[[PyTree, Batch], dict[str, Array]]:
    """The exact diagonal of the Gauss-Newton matrix, `[d_in + 1, d_out]` per layer."""
    return _diagonals(objective, False, chunk_size)


def _per_example(objective: Objective, hessian: bool, reduce: str | None, chunk_size: int):
    if reduce not in (None, "mean"):
        raise OptionError(f'reduce must be None or "mean", found {reduce!r}')

    def matrices(params, batch):
        prepared = prepare(objective, params, batch, hessian, exact=False)
        arguments = prepared.arguments

        def one(example):
            return prepared.walk_one(example).uses

        if reduce is None:
            return jax.lax.map(one, arguments, batch_size=batch_size_of(arguments, chunk_size))
        return mean_over(one, arguments, chunk_size)

    return matrices


def _diagonals(objective: Objective, hessian: bool, chunk_size: int):
    def diagonals(params, batch):
        prepared = prepare(objective, params, batch, hessian, diagonal=True)
        arguments = prepared.arguments

        def one(example):
            walked = prepared.walk_one(example)
            whole, rows = free_matrices(prepared.graph, walked, params), {}
            result = {
                name: jnp.diagonal(block, axis1=-2, axis2=-1) for name, block in whole.items()
            }
            for name, use in prepared.graph.kept_uses.items():
                if use.form.positions == 1:
                    rows[name] = walked.uses[name]
                else:
                    a = prepared.activations(use, example)
                    result[name] = shared_diagonal(use, a, walked.uses[name])
            return rows, result

        rows, found = jax.lax.map(one, arguments, batch_size=batch_size_of(arguments, chunk_size))
        found = {name: jnp.mean(x, axis=0) for name, x in found.items()}
        inputs = dict(zip(prepared.place, arguments[0], strict=True))
        for name, row in rows.items():
            use = prepared.graph.kept_uses[name]
            found[name] = single_diagonal(use, inputs[use.input], row)
        return in_shape(prepared.graph, params, found)

    return diagonals


def _dense_blocks(objective: Objective, hessian: bool):
    def blocks(params, batch):
        prepared = prepare(objective, params, batch, hessian)
        return mean_over(example_blocks(prepared, params), prepared.arguments, 1)

    return blocks


def example_blocks(prepared: Prepared, params: PyTree) -> Callable[[Any], dict[str, Array]]:
    """The blocks of one example, as a function of its part of `prepared.arguments`."""
    graph = prepared.graph

    def blocks(example):
        walked = prepared.walk_one(example)
        result = free_matrices(graph, walked, params)
        for name, layer in graph.layers.items():
            if name not in result:
                slots = [
                    use_block(use, prepared.activations(use, example), walked.uses[key])
                    for key, use in layer.uses.items()
                ]
                result[name] = slots[0] if len(slots) == 1 else jnp.stack(slots)
        return result

    return blocks


def _block_matvecs(objective: Objective, full_product: Callable):
    """The full product with a direction in one block, read in the same block."""

    def matvecs(params, batch):
        inputs, _ = check_batch(batch)
        graph = build_graph(objective, params, inputs)
        product = full_product(objective)

        def along(leaves: dict[str, Array]) -> dict[str, Array]:
            direction = with_leaves(jax.tree.map(jnp.zeros_like, params), leaves)
            return named_leaves(product(params, batch, direction))

        def matvec_of(layer: Layer):
            def matvec(matrix: Array) -> Array:
                slots = matrix.reshape(len(layer.slots), -1)
                parts = []
                for k in range(len(layer.slots)):
                    alone = jnp.zeros_like(slots).at[k].set(slots[k]).reshape(layer.matrix_shape)
                    moved = layer.to_matrix(along(layer.from_matrix(alone)))
                    parts.append(moved.reshape(slots.shape)[k])
                return jnp.stack(parts).reshape(layer.matrix_shape)

            return matvec

        result: dict[str, Any] = {n: matvec_of(layer) for n, layer in graph.layers.items()}
        for name in graph.reasons:
            result[name] = lambda vector, name=name: along({name: vector})[name]
        return result

    return matvecs
