"""The exact recursion, run example by example, and what it gives a block.

An example's block of a use is `sum_tu (a_t a_u') ⊗ M_tu`, with the matrix M of
the walk at its pre-activation; that of a free parameter the walk ends with.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.devices import vary_like
from kfgn.base.linalg import factor_dtype, map_examples, matmul, precision
from kfgn.base.trees import batch_of, named_leaves
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.curvature.blocks import blocks_of
from kfgn.curvature.factors import entries_of
from kfgn.curvature.linear_pass import only_backwards
from kfgn.curvature.recursion import Walk, Walked, needed_values, walk_back
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use
from kfgn.objective.objective import Objective, check_outputs, read_batch
from kfgn.objective.weights import loss_of, rooted


class Prepared(NamedTuple):
    """A batch's forward pass, and the walk of one example of it."""

    graph: Graph
    walk_one: Callable[[Any], Walked]
    arguments: Any  # of `walk_one`, for all examples: kept values, inputs, outputs, targets
    order: dict[Any, int]  # of each kept value among an example's values
    dtype: Any

    def activations(self, use: Use, arguments: Any) -> Float[Array, "s t i"]:
        """One example's inputs of a use."""
        values = arguments[0][self.order[use.input]]
        return use.activations(values[None], self.dtype)[0]


def prepare(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    matrix: Callable[[PyTree, PyTree], Float[Array, "K K"]] | None,
    second_order: bool = False,
    diagonal: bool = False,
    exact: bool = True,
) -> Prepared:
    """The forward pass of a batch, and the walk that starts from a matrix in the outputs.

    Args:
      matrix: `(outputs, target) -> B` of one example; None stands for
        `gg'` of its gradient g, whose walk is one backward pass.
      second_order: whether the nodes' own curvature is added, for the Hessian.
      diagonal, exact: as in `walk_back` and `build_graph`.
    """
    inputs, targets = read_batch(objective, batch)
    graph = build_graph(objective, params, inputs, exact, unroll=True)
    leaves, keep, loss = (
        named_leaves(params),
        needed_values(graph),
        loss_of(objective.loss, targets),
    )
    outputs, kept = graph.forward(leaves, inputs, keep=keep)
    check_outputs(loss, outputs, inputs, targets)
    shared = graph.shared_values(leaves)
    dtype = factor_dtype(*(x.dtype for x in jax.tree.leaves((leaves, outputs))))

    def one(arguments: Any) -> Walked:
        values, _, output, target = arguments
        walk = Walk(graph, shared, {v: x[None] for v, x in zip(keep, values, strict=True)})
        one_of = batch_of((output, target))
        gradient = loss.gradients(*one_of).astype(dtype) if second_order else None
        assert matrix is not None
        return walk_back(walk, matrix(output, target).astype(dtype), gradient, diagonal)

    own = {name: jnp.asarray(leaves[name]) for name in graph.free}

    def gradients(
        example: PyTree, target: PyTree, own: dict[str, Array], probes: dict[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """One example's at the uses, and at the free parameters."""

        def value(own: dict[str, Array], probes: dict[str, Array]) -> Scalar:
            outputs, _ = graph.forward({**leaves, **own}, example, probes)
            return jnp.sum(jax.vmap(loss)(outputs, target))

        found = jax.grad(value, (1, 0))(own, probes)
        return jax.tree.map(lambda g: g.reshape(-1).astype(dtype), found)

    def outer(arguments: Any) -> Walked:
        _, example, _, target = batch_of(arguments)
        target, sign = rooted(target)
        sign = jnp.asarray(sign, dtype)
        uses, free = gradients(example, target, own, vary_like(graph.probes(1), example))
        return Walked(
            {name: sign * g[:, None] * g for name, g in uses.items()},
            {(p, q): sign * free[p][:, None] * free[q] for p in free for q in free},
        )

    def differentiated(arguments: Any) -> Walked:
        """As jax differentiates the backward pass, which a `custom_vjp` rule may be part of."""
        _, example, _, target = batch_of(arguments)
        probes, uses = vary_like(graph.probes(1), example), {}

        def of(own: dict[str, Array], probes: dict[str, Array]) -> Any:
            return gradients(example, target, own, probes)

        jacobian = jax.jacrev if only_backwards(of, own, probes) else jax.jacfwd
        for name, probe in probes.items():
            in_probe = jacobian(lambda z, n=name: of(own, {**probes, n: z})[0][n])
            found = in_probe(probe).reshape(probe.size, -1)
            vector = diagonal and graph.uses[name].form.positions == 1
            uses[name] = jnp.diag(found) if vector else found
        free = jacobian(lambda own: of(own, probes)[1])(own) if own else {}
        pairs = {(p, q): b.reshape(-1, own[q].size) for p in free for q, b in free[p].items()}
        return Walked(uses, pairs)

    order = {v: k for k, v in enumerate(keep)}
    arguments = (kept, inputs, outputs, targets)
    walk = outer if matrix is None else one
    if second_order and graph.model.reverse_only:
        walk = differentiated
    return Prepared(graph, walk, arguments, order, dtype)


def example_blocks(prepared: Prepared, params: PyTree) -> Callable[[Any], dict[str, Array]]:
    """The blocks of one example, as a function of its part of `prepared.arguments`."""
    graph = prepared.graph

    def blocks(example: Any) -> dict[str, Array]:
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


def mean_diagonals(prepared: Prepared, params: PyTree, chunk_size: int | None) -> dict[str, Array]:
    """The diagonals of the mean blocks, by layer in the shape of its matrix."""
    graph, arguments = prepared.graph, prepared.arguments

    def one(example: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        walked = prepared.walk_one(example)
        whole, rows = free_matrices(graph, walked, params), {}
        result = {name: jnp.diagonal(block, axis1=-2, axis2=-1) for name, block in whole.items()}
        for name, use in graph.kept_uses.items():
            if use.form.positions == 1:
                rows[name] = walked.uses[name]
            else:
                a = prepared.activations(use, example)
                result[name] = shared_diagonal(use, a, walked.uses[name])
        return rows, result

    rows, found = map_examples(one, arguments, chunk_size)
    found = {name: jnp.mean(x, axis=0) for name, x in found.items()}
    for name, row in rows.items():
        use = graph.kept_uses[name]
        found[name] = single_diagonal(use, arguments[0][prepared.order[use.input]], row)
    result = {}
    for name, block in blocks_of(graph).items():
        parts = [found[n].reshape(-1) for n in ((name,) if name in found else block.uses)]
        result[name] = jnp.concatenate(parts).reshape(block.matrix_shape)
    return result


def single_diagonal(use: Use, values: Array, rows: Float[Array, "N D"]) -> Float[Array, "s i o"]:
    """`mean_n a_n^2 ⊗ diag(H_n)` at a single position."""
    squares = jnp.square(use.activations(values, rows.dtype))[:, :, 0]
    entries = entries_of(use).reshape(-1)
    curved = rows if _is_range(entries, rows.shape[1]) else rows[:, entries]
    if use.form.groups == 1:
        return (matmul(squares[:, 0].T, curved) / rows.shape[0])[None]
    curved = curved.reshape(rows.shape[0], use.form.groups, use.form.d_out)
    return jnp.einsum("nsi,nso->sio", squares, curved, precision=precision()) / rows.shape[0]


def shared_diagonal(
    use: Use, a: Float[Array, "s t i"], matrix: Float[Array, "D D"]
) -> Float[Array, "s i o"]:
    """The diagonal of one example's block at several positions."""
    own = np.moveaxis(entries_of(use), 1, 2)  # `[s, o, t]`
    between = matrix[own[..., :, None], own[..., None, :]]
    return jnp.einsum("sti,spi,sotp->sio", a, a, between, precision=precision())


def use_block(
    use: Use, a: Float[Array, "s t i"], matrix: Float[Array, "D D"]
) -> Float[Array, "P P"]:
    """One example's block of a use, from its inputs and the matrix at its pre-activation."""
    groups, positions, d_out = use.form.groups, use.form.positions, use.form.d_out
    entries = entries_of(use).reshape(-1)
    if not _is_range(entries, len(matrix)):
        matrix = matrix[entries][:, entries]
    between = matrix.reshape(groups, positions, d_out, groups, positions, d_out)
    block = jnp.einsum("sti,stoupq,upj->sioujq", a, between, a, precision=precision())
    return block.reshape(2 * (groups * use.width * d_out,))


def _is_range(entries: np.ndarray, size: int) -> bool:
    """Whether these are all entries in their order."""
    return entries.size == size and bool(np.all(entries == np.arange(size)))


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

        def read(row: Array, own: Any = own, edges: Any = edges, layer: Layer = layer) -> Array:
            parts = zip(jnp.split(row, edges), own.items(), strict=True)
            return layer.to_matrix({n: x.reshape(leaf.shape) for x, (n, leaf) in parts}).reshape(-1)

        block = jax.vmap(read)(jax.vmap(read)(whole).T)
        slots = layer.kernels
        if slots > 1:
            split = block.reshape(slots, block.shape[0] // slots, slots, -1)
            block = jnp.stack([split[k, :, k] for k in range(slots)])
        result[layer_name] = block
    return result
