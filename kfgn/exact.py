"""Exact curvature: pre-activation matrices per example, blocks, diagonals, products.

All are curvature of the mean per-example loss, without the l2 term, whose
curvature is `l2` times the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.errors import OptionError
from kfgn.graph import Graph, build_graph
from kfgn.layer import Layer
from kfgn.linalg import PRECISION, factor_dtype, matmul
from kfgn.loss import flatten_batch
from kfgn.objective import Objective, check_batch, check_outputs
from kfgn.paths import named_leaves, with_leaves
from kfgn.use import Use
from kfgn.walk import Walk, Walked, needed_values, walk_back

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


class _Prepared(NamedTuple):
    """A batch's forward pass, and the walk of one example of it."""

    graph: Graph
    walk_one: Callable[[Any], Walked]
    arguments: list[Any]  # of `walk_one`, for all examples
    place: dict[Any, int]  # of each kept value among an example's values
    dtype: Any

    def activations(self, use: Use, arguments: Any) -> Array:
        """One example's inputs of a use, `[s, t, i]`."""
        values = arguments[0][self.place[use.input]]
        return use.activations(values[None], self.dtype)[0]


def _prepare(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    hessian: bool,
    diagonal: bool = False,
    exact: bool = True,
) -> _Prepared:
    inputs, targets = check_batch(batch)
    graph = build_graph(objective, params, inputs, exact)
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
        return walk_back(walk, matrix(output, target).astype(dtype), gradient, diagonal)

    place = {v: k for k, v in enumerate(keep)}
    return _Prepared(graph, one, [kept, outputs, targets], place, dtype)


def _per_example(objective: Objective, hessian: bool, reduce: str | None, chunk_size: int):
    if reduce not in (None, "mean"):
        raise OptionError(f'reduce must be None or "mean", found {reduce!r}')

    def matrices(params, batch):
        prepared = _prepare(objective, params, batch, hessian, exact=False)
        arguments = prepared.arguments

        def one(example):
            return prepared.walk_one(example).uses

        if reduce is None:
            return jax.lax.map(one, arguments, batch_size=_batch_size(arguments, chunk_size))
        return _mean(one, arguments, chunk_size)

    return matrices


def _diagonals(objective: Objective, hessian: bool, chunk_size: int):
    def diagonals(params, batch):
        prepared = _prepare(objective, params, batch, hessian, diagonal=True)
        arguments = prepared.arguments

        def one(example):
            walked = prepared.walk_one(example)
            whole, rows = _free_matrices(prepared.graph, walked, params), {}
            result = {name: jnp.diagonal(block, axis1=-2, axis2=-1) for name, block in whole.items()}
            for name, use in prepared.graph.kept_uses.items():
                if use.form.positions == 1:
                    rows[name] = walked.uses[name]
                else:
                    a = prepared.activations(use, example)
                    result[name] = _shared_diagonal(use, a, walked.uses[name])
            return rows, result

        rows, found = jax.lax.map(one, arguments, batch_size=_batch_size(arguments, chunk_size))
        found = {name: jnp.mean(x, axis=0) for name, x in found.items()}
        inputs = dict(zip(prepared.place, arguments[0], strict=True))
        for name, row in rows.items():
            use = prepared.graph.kept_uses[name]
            found[name] = _single_diagonal(use, inputs[use.input], row)
        return _in_shape(prepared.graph, params, found)

    return diagonals


def _single_diagonal(use: Use, values: Array, rows: Array) -> Array:
    """`mean_n a_n^2 ⊗ diag(H_n)` of a use in one place, `[s, i, o]`."""
    squares = jnp.square(use.activations(values, rows.dtype))[:, :, 0]
    places = use.pre_activations(np.arange(rows.shape[1]).reshape(use.output.aval.shape))
    curved = rows if _is_range(places, rows.shape[1]) else rows[:, places.reshape(-1)]
    if use.form.groups == 1:
        return (matmul(squares[:, 0].T, curved) / rows.shape[0])[None]
    curved = curved.reshape(rows.shape[0], use.form.groups, use.form.d_out)
    return jnp.einsum("nsi,nso->sio", squares, curved, precision=PRECISION) / rows.shape[0]


def _shared_diagonal(use: Use, a: Array, matrix: Array) -> Array:
    """The diagonal of one example's block of a use in several places, `[s, i, o]`."""
    places = use.pre_activations(np.arange(matrix.shape[0]).reshape(use.output.aval.shape))
    own = np.moveaxis(places, 1, 2)  # `[s, o, t]`
    between = matrix[own[..., :, None], own[..., None, :]]
    return jnp.einsum("sti,spi,sotp->sio", a, a, between, precision=PRECISION)


def _in_shape(graph: Graph, params: PyTree, found: dict[str, Array]) -> dict[str, Array]:
    """Diagonals by use, or by block, as one per layer in the shape of its matrix."""
    leaves, result = named_leaves(params), {}
    for name, layer in graph.layers.items():
        parts = [found[name]] if name in found else [found[use] for use in layer.uses]
        result[name] = jnp.concatenate([p.reshape(-1) for p in parts]).reshape(layer.matrix_shape)
    for name in graph.reasons:
        result[name] = found[name].reshape(jnp.shape(leaves[name]))
    return result


def _dense_blocks(objective: Objective, hessian: bool):
    def blocks(params, batch):
        prepared = _prepare(objective, params, batch, hessian)
        graph = prepared.graph

        def block(example):
            walked = prepared.walk_one(example)
            result = _free_matrices(graph, walked, params)
            for name, layer in graph.layers.items():
                if name not in result:
                    slots = [
                        _use_block(use, prepared.activations(use, example), walked.uses[key])
                        for key, use in layer.uses.items()
                    ]
                    result[name] = slots[0] if len(slots) == 1 else jnp.stack(slots)
            return result

        return _mean(block, prepared.arguments, 1)

    return blocks


def _use_block(use: Use, a: Array, matrix: Array) -> Array:
    """One example's block of a use, from its inputs and the matrix at its pre-activation."""
    groups, positions, d_out = use.form.groups, use.form.positions, use.form.d_out
    places = use.pre_activations(np.arange(matrix.shape[0]).reshape(use.output.aval.shape))
    if not _is_range(places, len(matrix)):
        matrix = matrix[places.reshape(-1)][:, places.reshape(-1)]
    between = matrix.reshape(groups, positions, d_out, groups, positions, d_out)
    block = jnp.einsum("sti,stoupq,upj->sioujq", a, between, a, precision=PRECISION)
    return block.reshape(2 * (groups * use.width * d_out,))


def _is_range(places: np.ndarray, size: int) -> bool:
    """Whether the places are all entries in their order."""
    return places.size == size and bool(np.all(places.reshape(-1) == np.arange(size)))


def _free_matrices(graph: Graph, walked: Walked, params: PyTree) -> dict[str, Array]:
    """Blocks of free parameters: of tied layers by layer, of those in no layer by parameter."""
    leaves = named_leaves(params)
    result = {name: walked.free[name, name] for name in graph.reasons if name in graph.free}
    for layer_name, layer in graph.layers.items():
        if layer.first.kernel.name not in graph.free:
            continue
        own = {name: leaves[name] for name in layer.parameters}
        whole = jnp.block([[walked.free[p, q] for q in own] for p in own])
        edges = np.cumsum([np.size(leaf) for leaf in own.values()])[:-1]

        def read(row, own=own, edges=edges, layer=layer):
            parts = zip(jnp.split(row, edges), own.items(), strict=True)
            return layer.to_matrix({n: x.reshape(leaf.shape) for x, (n, leaf) in parts}).reshape(-1)

        block = jax.vmap(read)(jax.vmap(read)(whole).T)
        slots = len(layer.slots)
        if slots > 1:
            split = block.reshape(slots, block.shape[0] // slots, slots, -1)
            block = jnp.stack([split[k, :, k] for k in range(slots)])
        result[layer_name] = block
    return result


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
