"""The exact recursion, run example by example, and what it gives a block.

An example's block of a use is `sum_tu (a_t a_u') ⊗ M_tu`, with the matrix M of
the walk at its pre-activation; that of a free parameter the walk ends with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import OptionError
from kfgn.base.linalg import PRECISION, factor_dtype, matmul
from kfgn.base.trees import named_leaves
from kfgn.curvature.recursion import Walk, Walked, needed_values, walk_back
from kfgn.model.graph import Graph, build_graph
from kfgn.model.parameter_use import Use
from kfgn.objective.objective import Objective, check_batch, check_outputs

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]


class Prepared(NamedTuple):
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


def prepare(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    hessian: bool,
    diagonal: bool = False,
    exact: bool = True,
) -> Prepared:
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
    return Prepared(graph, one, [kept, outputs, targets], place, dtype)


def single_diagonal(use: Use, values: Array, rows: Array) -> Array:
    """`mean_n a_n^2 ⊗ diag(H_n)` of a use in one place, `[s, i, o]`."""
    squares = jnp.square(use.activations(values, rows.dtype))[:, :, 0]
    places = use.pre_activations(np.arange(rows.shape[1]).reshape(use.output.aval.shape))
    curved = rows if _is_range(places, rows.shape[1]) else rows[:, places.reshape(-1)]
    if use.form.groups == 1:
        return (matmul(squares[:, 0].T, curved) / rows.shape[0])[None]
    curved = curved.reshape(rows.shape[0], use.form.groups, use.form.d_out)
    return jnp.einsum("nsi,nso->sio", squares, curved, precision=PRECISION) / rows.shape[0]


def shared_diagonal(use: Use, a: Array, matrix: Array) -> Array:
    """The diagonal of one example's block of a use in several places, `[s, i, o]`."""
    places = use.pre_activations(np.arange(matrix.shape[0]).reshape(use.output.aval.shape))
    own = np.moveaxis(places, 1, 2)  # `[s, o, t]`
    between = matrix[own[..., :, None], own[..., None, :]]
    return jnp.einsum("sti,spi,sotp->sio", a, a, between, precision=PRECISION)


def in_shape(graph: Graph, params: PyTree, found: dict[str, Array]) -> dict[str, Array]:
    """Diagonals by use, or by block, as one per layer in the shape of its matrix."""
    leaves, result = named_leaves(params), {}
    for name, layer in graph.layers.items():
        parts = [found[name]] if name in found else [found[use] for use in layer.uses]
        result[name] = jnp.concatenate([p.reshape(-1) for p in parts]).reshape(layer.matrix_shape)
    for name in graph.reasons:
        result[name] = found[name].reshape(jnp.shape(leaves[name]))
    return result


def use_block(use: Use, a: Array, matrix: Array) -> Array:
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


def free_matrices(graph: Graph, walked: Walked, params: PyTree) -> dict[str, Array]:
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


def batch_size_of(arguments: Any, chunk_size: int) -> int | None:
    """lax.map's chunk: None for one at a time, which keeps every product two-dimensional."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise OptionError(f"chunk_size must be an integer of at least 1, found {chunk_size!r}")
    count = jax.tree.leaves(arguments)[0].shape[0]
    return None if chunk_size == 1 else min(chunk_size, count)


def mean_over(function: Callable, arguments: Any, chunk_size: int) -> Any:
    """The mean over examples of a function of one, a chunk at a time."""
    count = jax.tree.leaves(arguments)[0].shape[0]
    size = batch_size_of(arguments, chunk_size) or 1
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
