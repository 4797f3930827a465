"""Exact curvature: pre-activation matrices per example, blocks, diagonals, products.

All are curvature of the mean per-example loss, without the l2 term, whose
curvature is `l2` times the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.errors import OptionError
from kfgn.graph import Graph, build_graph
from kfgn.layer import Layer, require_blocks
from kfgn.linalg import PRECISION, factor_dtype, matmul
from kfgn.loss import flatten_batch
from kfgn.objective import Objective, check_batch, check_outputs
from kfgn.paths import named_leaves, with_leaves
from kfgn.walk import Walk, needed_values, pre_activation_matrices

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


def hessian_vector_product(objective: Objective) -> Callable[[PyTree, Batch, PyTree], PyTree]:
    """`(params, batch, vector) -> H vector`, `vector` a pytree like params."""

    def product(params, batch, vector):
        gradient = jax.grad(lambda p: objective.mean_loss(p, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]

    return product


def gauss_newton_vector_product(
    objective: Objective,
) -> Callable[[PyTree, Batch, PyTree], PyTree]:
    """`(params, batch, vector) -> J'HJ vector`, eq. (13), by the R-operator."""

    def product(params, batch, vector):
        inputs, targets = check_batch(batch)
        outputs, push = jax.linearize(lambda p: objective.model(p, inputs), params)
        check_outputs(objective.loss, outputs, inputs, targets)
        pushed = flatten_batch(push(vector))
        curved = jax.vmap(objective.loss.gauss_newton_product)(outputs, targets, pushed)
        leaves, tree = jax.tree.flatten(outputs)
        parts, start = [], 0
        for leaf in leaves:
            part = curved[:, start : start + leaf[0].size] / leaf.shape[0]
            parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
            start += leaf[0].size
        (result,) = jax.linear_transpose(push, params)(jax.tree.unflatten(tree, parts))
        return result

    return product


# How the walk is run example by example.

_Prepared = tuple[Graph, Callable[..., dict[str, Array]], list[Any]]


def _prepare(
    objective: Objective, params: PyTree, batch: Batch, hessian: bool, diagonal: bool
) -> _Prepared:
    """The graph, the walk of one example, and its arguments for all examples."""
    inputs, targets = check_batch(batch)
    graph = build_graph(objective, params, inputs)
    require_blocks(graph.reasons)
    leaves, keep, loss = named_leaves(params), needed_values(graph), objective.loss
    outputs, kept = graph.forward(leaves, inputs, keep=keep)
    check_outputs(loss, outputs, inputs, targets)
    shared = graph.shared_values(leaves)
    dtype = factor_dtype(*(x.dtype for x in jax.tree.leaves((leaves, outputs))))

    def one(arguments):
        values, output, target = arguments
        walk = Walk(graph, shared, {v: x[None] for v, x in zip(keep, values, strict=True)})
        one_of = jax.tree.map(lambda a: a[None], (output, target))
        gradient = loss.gradients(*one_of).astype(dtype) if hessian else None
        matrix = loss.hessian if hessian else loss.gauss_newton_hessian
        return pre_activation_matrices(
            walk, matrix(output, target).astype(dtype), gradient, diagonal
        )

    return graph, one, [kept, outputs, targets]


def _per_example(objective: Objective, hessian: bool, reduce: str | None, chunk_size: int):
    if reduce not in (None, "mean"):
        raise OptionError(f'reduce must be None or "mean", found {reduce!r}')

    def matrices(params, batch):
        _, one, arguments = _prepare(objective, params, batch, hessian, diagonal=False)
        if reduce is None:
            return jax.lax.map(one, arguments, batch_size=_batch_size(arguments, chunk_size))
        return _mean(one, arguments, chunk_size)

    return matrices


def _diagonals(objective: Objective, hessian: bool, chunk_size: int):
    def diagonals(params, batch):
        graph, one, arguments = _prepare(objective, params, batch, hessian, diagonal=True)
        rows = jax.lax.map(one, arguments, batch_size=_batch_size(arguments, chunk_size))
        inputs = dict(zip(needed_values(graph), arguments[0], strict=True))
        result = {}
        for name, layer in graph.layers.items():
            squares = jnp.square(layer.activations(inputs[layer.input]).astype(rows[name].dtype))
            result[name] = matmul(squares.T, rows[name]) / squares.shape[0]
        return result

    return diagonals


def _dense_blocks(objective: Objective, hessian: bool):
    def blocks(params, batch):
        graph, one, arguments = _prepare(objective, params, batch, hessian, diagonal=False)
        inputs = dict.fromkeys(needed_values(graph))
        position = {v: k for k, v in enumerate(inputs)}

        def block(example):
            matrices = one(example)
            result = {}
            for name, layer in graph.layers.items():
                a = layer.activations(example[0][position[layer.input]][None])[0]
                a = a.astype(matrices[name].dtype)
                result[name] = jnp.einsum("i,j,ab->iajb", a, a, matrices[name], precision=PRECISION)
            return result

        means = _mean(block, arguments, 1)
        return {name: _square(graph.layers[name], mean) for name, mean in means.items()}

    return blocks


def _square(layer: Layer, block: Array) -> Array:
    size = layer.activation_size * layer.d_out
    return block.reshape(size, size)


def _block_matvecs(objective: Objective, full_product: Callable):
    """The full product with a direction in one layer, read in the same layer: its block."""

    def matvecs(params, batch):
        inputs, _ = check_batch(batch)
        graph = build_graph(objective, params, inputs)
        require_blocks(graph.reasons)
        product = full_product(objective)

        def matvec_of(layer: Layer):
            def matvec(matrix: Array) -> Array:
                direction = with_leaves(
                    jax.tree.map(jnp.zeros_like, params), layer.from_matrix(matrix)
                )
                return layer.to_matrix(named_leaves(product(params, batch, direction)))

            return matvec

        return {name: matvec_of(layer) for name, layer in graph.layers.items()}

    return matvecs


def _batch_size(arguments: Any, chunk_size: int) -> int | None:
    """lax.map's chunk: None for one at a time, which keeps every product two-dimensional."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise OptionError(f"chunk_size must be an integer of at least 1, found {chunk_size!r}")
    count = jax.tree.leaves(arguments)[0].shape[0]
    return None if chunk_size == 1 else min(chunk_size, count)


def _mean(function: Callable, arguments: Any, chunk_size: int) -> Any:
    """The mean over examples of a function of one, a chunk at a time."""
    count = jax.tree.leaves(arguments)[0].shape[0]
    size = _batch_size(arguments, chunk_size) or 1
    whole = count // size

    def total(chunk):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(function)(chunk))

    if size == 1:

        def total(chunk):
            return function(jax.tree.map(lambda a: a[0], chunk))

    head = jax.tree.map(lambda a: a[: whole * size].reshape(whole, size, *a.shape[1:]), arguments)
    shapes = jax.eval_shape(total, jax.tree.map(lambda a: a[0], head))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    result, _ = jax.lax.scan(
        lambda acc, chunk: (jax.tree.map(jnp.add, acc, total(chunk)), None), start, head
    )
    if count > whole * size:
        tail = jax.tree.map(lambda a: a[whole * size :], arguments)
        rest = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(function)(tail))
        result = jax.tree.map(jnp.add, result, rest)
    return jax.tree.map(lambda x: x / count, result)
