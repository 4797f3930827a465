"""The backward walk: one recursion for every pre-activation matrix of the paper.

The walk carries a *frontier*, the live values of the graph, and for every pair
(u, v) of them the block S[u, v] `[D_u, D_v]` of the curvature with respect to
their concatenation. Popping a node with outputs o, p and inputs i, j:

    S'[i, j] += sum_{o,p} E[J_oi' S[o, p] J_pj],    S'[i, v] += sum_o E[J_oi'] S[o, v]

On a chain this is equation (26), the KFRA recursion. With a single example the
expectations do nothing and it is equation (22), exact; with the curvature of
each node added, equation (8), the Hessian. So there is one walk, over a batch,
and the exact matrices per example are its vmap over batches of one.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_size
from kfgn.base.devices import AxisName, mean_over_devices, vary_like
from kfgn.base.errors import ModelError
from kfgn.base.types import Array
from kfgn.curvature.jacobians import Jacobian, jacobian_of, node_curvature
from kfgn.model.graph.graph import Graph, Node
from kfgn.model.program.equations import Var, is_variable, size

# The largest single matrix that a walk forms.
MATRIX_BYTES = 2**31


class Walk(NamedTuple):
    """What a walk needs of one batch of N examples."""

    graph: Graph
    shared: dict[Var, Array]  # values that are the same for every example
    values: dict[Var, Array]  # values `[N, ...]` per example, see `needed_values`
    axis_name: AxisName | None = None  # of devices that have further examples
    importance: Float[Array, " N"] | None = None  # of the examples, of mean 1


def used_values(graph: Graph) -> list[Var]:
    """The per-example values that factors read."""
    uses = graph.uses.values()
    chosen = [use.choice.index for use in uses if use.choice is not None]
    return list(dict.fromkeys([*(use.input for use in uses), *chosen]))


def needed_values(graph: Graph) -> list[Var]:
    """The per-example values that walks and activation factors read."""
    needed: list[Var] = []
    for node in graph.nodes:
        if node.use is not None:
            needed.append(node.use.input)
        if node.kind not in ("linear", "use"):
            needed.extend(node.inputs + node.passive)
    return list(dict.fromkeys(needed))


class Walked(NamedTuple):
    """What a walk found."""

    uses: dict[str, Array]  # by use: the matrix over its whole pre-activation, `[D, D]`
    free: dict[tuple[str, str], Array]  # by pair of free parameters, `[P, P']`


class Frontier:
    """The live values and the blocks between them; absent blocks are zero.

    A block is kept once for each pair. For values in `diagonal_only` the block
    with itself is a vector, its diagonal.
    """

    def __init__(self, diagonal_only: frozenset[Var], dtype: Any, axis_name: AxisName | None):
        self.dtype = dtype
        self.axis_name = axis_name
        self.diagonal_only = diagonal_only
        self.live: dict[Var, None] = {}
        self.blocks: dict[tuple[Var, Var], Array] = {}

    def get(self, u: Var, v: Var) -> Array | None:
        if (u, v) in self.blocks:
            return self.blocks[u, v]
        if (v, u) in self.blocks:
            return self.blocks[v, u].T
        return None

    def add(self, u: Var, v: Var, block: Array | None) -> None:
        if block is None:
            return
        self.live.update({u: None, v: None})
        if u is v and u in self.diagonal_only and block.ndim == 2:
            block = jnp.diag(block)
        if (v, u) in self.blocks and u is not v:
            u, v, block = v, u, block.T
        old = self.blocks.get((u, v))
        self.blocks[u, v] = block if old is None else old + block

    def drop(self, values: Iterable[Var]) -> None:
        gone = set(values)
        self.live = {v: None for v in self.live if v not in gone}
        self.blocks = {k: b for k, b in self.blocks.items() if not gone.intersection(k)}

    def pop(self, node: Node, jacobian: Jacobian, live: list[Var]) -> None:
        """Replaces the node's outputs by its inputs."""
        own = {(o, p): b for o in live for p in live if (b := self.get(o, p)) is not None}
        rest = [v for v in self.live if v not in node.outputs]
        cross = {(o, v): b for o in live for v in rest if (b := self.get(o, v)) is not None}
        self.drop(node.outputs)
        for (o, v), block in cross.items():
            for i in node.inputs:
                moved = self._mean(node, jacobian.left(o, i, block))
                if i is v and moved is not None:
                    moved = moved + moved.T  # S[v, v] gains J'S[o, v] and its transpose
                self.add(i, v, moved)
        for a, i in enumerate(node.inputs):
            for j in node.inputs[a:]:
                if i is j and i in self.diagonal_only:
                    moved = jacobian.congruence_diagonal(own, i)
                else:
                    moved = jacobian.congruence(own, i, j)
                self.add(i, j, self._mean(node, moved))

    def _mean(self, node: Node, moved: Array | None) -> Array | None:
        """The expectation over the examples of all devices; both sides of a walk vary alike."""
        if moved is None or node.kind in ("linear", "use"):  # the same for every example
            return moved
        return vary_like(mean_over_devices(moved, self.axis_name), moved)


def walk_back(
    walk: Walk,
    output_hessian: Float[Array, "K K"],
    output_gradient: Float[Array, "N K"] | None = None,
    diagonal: bool = False,
) -> Walked:
    """Pre-activation curvature of every use, and the blocks of the free parameters.

    Args:
      walk: the batch.
      output_hessian: `[K, K]`, with respect to the flattened outputs.
      output_gradient: `[N, K]`; if given, the curvature of the nodes is added
        (the Hessian); if None, it is left out (Gauss-Newton).
      diagonal: return diagonals `[D]` for uses in one place, and never form a
        matrix that is not needed further up: what lies above the first layers
        is formed as a diagonal only.

    Raises:
      ModelError: a matrix would be too large to form.
    """
    graph, dtype = walk.graph, output_hessian.dtype
    vectors = _diagonal_values(graph) if diagonal else frozenset[Var]()
    _check_size(graph, vectors, dtype)
    found, frontier = walk_nodes(
        walk,
        output_hessian,
        lambda node: jacobian_of(node, walk.shared, walk.values, walk.importance),
        lambda u, v, block: block,
        vectors,
        output_gradient,
    )

    def block_of(u: Var, v: Var) -> Array:
        block = frontier.get(u, v)
        return jnp.zeros((size(u), size(v)), dtype) if block is None else block

    uses = {}
    for name, block in found.items():
        use = graph.uses[name]
        if block is None:
            block = block_of(use.output, use.output)
        vector = diagonal and use.form.positions == 1
        uses[name] = jnp.diag(block) if vector and block.ndim == 2 else block
    own = {name: graph.model.parameters[name] for name in graph.free}
    return Walked(uses, {(p, q): block_of(u, v) for p, u in own.items() for q, v in own.items()})


def walk_nodes(
    walk: Walk,
    output_hessian: Float[Array, "K K"],
    jacobian_of: Callable[[Node], Jacobian],
    start: Callable[[Var, Var, Array], Array | None],
    diagonal_only: frozenset[Var] = frozenset(),
    output_gradient: Float[Array, "N K"] | None = None,
) -> tuple[dict[str, Array | None], Frontier]:
    """What the frontier holds of every use's output, and the frontier at the end.

    Args:
      walk, output_hessian, output_gradient: as in `walk_back`.
      jacobian_of: how a node acts on the frontier's blocks.
      start: `(u, v, block)` of two outputs to the block that the frontier carries.
      diagonal_only: as in `Frontier`.
    """
    graph = walk.graph
    gradients = {} if output_gradient is None else _split_outputs(graph, output_gradient)
    frontier = Frontier(diagonal_only, output_hessian.dtype, walk.axis_name)
    spans = output_spans(graph)
    for a, (u, start_u, stop_u) in enumerate(spans):
        for v, start_v, stop_v in spans[a:]:
            block = output_hessian[start_u:stop_u, start_v:stop_v]
            if u is v and start_u != start_v:
                block = block + block.T  # the same value returned twice
            frontier.add(u, v, start(u, v, block))
    name_of = {use: name for name, use in graph.uses.items()}
    result: dict[str, Array | None] = {}
    for node in reversed(graph.nodes):
        live = [o for o in node.outputs if o in frontier.live]
        outs = {o: gradients.pop(o) for o in node.outputs if o in gradients}
        if node.use is not None:
            result[name_of[node.use]] = frontier.get(node.outputs[0], node.outputs[0])
        if not node.inputs or not (live or outs):
            frontier.drop(node.outputs)
            continue
        jacobian = jacobian_of(node)
        frontier.pop(node, jacobian, live)
        if not outs:
            continue
        for (i, j), block in node_curvature(node, walk.shared, walk.values, outs).items():
            frontier.add(i, j, block.astype(frontier.dtype))
        for i, value in jacobian.gradient(outs).items():
            gradients[i] = gradients[i] + value if i in gradients else value
    return result, frontier


def _check_size(graph: Graph, vectors: frozenset[Var], dtype: Any) -> None:
    values = [v for node in graph.nodes for v in (*node.outputs, *node.inputs) if v not in vectors]
    largest = max(map(size, values), default=0)
    check_size(
        f"the recursion's matrix over a value of {largest} entries per example",
        (largest, largest),
        dtype,
        'For convolutions and sequences pass spatial="homogeneous" to method "kfra", or use method '
        '"kflr" or "kfac", whose factors have the size of the channels.',
        most=MATRIX_BYTES,
        error=ModelError,
    )


def output_spans(graph: Graph) -> list[tuple[Var, int, int]]:
    """The outputs that the walk starts from, each with its place among all outputs."""
    spans, start = [], 0
    for atom in graph.model.outputs:
        stop = start + int(atom.aval.size)
        if is_variable(atom) and graph.is_active(atom):
            spans.append((atom, start, stop))
        start = stop
    return spans


def _split_outputs(graph: Graph, gradient: Float[Array, "N K"]) -> dict[Var, Array]:
    cotangents: dict[Var, Array] = {}
    for v, start, stop in output_spans(graph):
        part = gradient[:, start:stop].reshape(-1, *v.aval.shape)
        cotangents[v] = cotangents[v] + part if v in cotangents else part
    return cotangents


def _diagonal_values(graph: Graph) -> frozenset[Var]:
    """Values whose block with itself no matrix further up needs.

    These are the pre-activations of layers that no layer precedes, and the
    values that reach only such pre-activations through elementwise nodes.
    """
    result: set[Var] = set()
    for node in graph.nodes:
        first_use = node.use is not None and not node.inputs and node.use.form.positions == 1
        carries = (
            node.kind == "elementwise"
            and len(node.inputs) == 1
            and all(i in result for i in node.inputs)
        )
        if first_use or carries:
            result.update(node.outputs)
    return frozenset(result)
