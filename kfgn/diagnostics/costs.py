"""What the parts of a model cost, in FLOPs; see `kfgn.inspect`."""

import contextlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.errors import LoopError
from kfgn.base.linalg import count_of, factor_dtype
from kfgn.base.types import PyTree
from kfgn.curvature.activations import examples_for
from kfgn.curvature.methods import LossCost, UseCost
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.graph.graph import Graph, Node
from kfgn.model.graph.unite import Term
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.dependence import keeps_order
from kfgn.model.program.equations import Equation, size
from kfgn.objective.objective import require_batch
from kfgn.objective.weights import loss_of

#: What factors and inverses together add to an update, in gradients, where their periods follow
#: cost; and the longest that those become.
SHARE, LONGEST = 0.6, 50
# A FLOP of an inversion takes as long as so many of a product (measured on two CPU cores).
_INVERSION = 4
#: Inversions that one eigendecomposition takes as long as (measured there, too).
DECOMPOSITION = 7
# FLOPs of a root of a matrix of K rows, in K³, that take as long as those of a product.
_ROOT = 8
#: Rows of a factor for every one that a batch knows of it, and at least, up to which it is whole.
_KNOWN, _LEAST = 3, 256
#: FLOPs of a product that an entry of another operation takes as long as where matrices of all
# examples go through it: memory is what it waits for (10 to 50 measured there).
ENTRY = 16
_MODEL_EXAMPLES = 256  # the default of `kfgn.value_grad_and_curvature`
REFRESH_EVERY = 5  # the default of `kfgn.kfra`, of factors and inverses


class Setting(NamedTuple):
    """What costs depend on besides a layer."""

    graph: Graph
    nodes: tuple[Node, ...] | None  # that a walk goes through; None where loops are too long
    examples: int
    columns: int
    loss: LossCost
    itemsize: int  # of a factor's entries
    rows: int | None  # `activation_rows` of `kfgn.value_grad_and_curvature`


def setting(term: Term, params: PyTree, rows: int | None) -> Setting:
    inputs, targets, outputs = require_batch(term.objective, params, (term.inputs, term.targets))
    loss, count = loss_of(term.objective.loss, targets), count_of(inputs)
    root = jax.eval_shape(lambda o, t: jnp.zeros(loss.sqrt_columns(o, t)[0]), outputs, targets)
    batch = jax.eval_shape(lambda *x: x, outputs, targets)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    size = loss.decomposed(*one)
    roots = (_ROOT if loss.convex else _INVERSION * DECOMPOSITION) * count * size**3
    cost = LossCost(0 if loss.convex else roots, roots, 0 if loss.can_sample else roots)
    dtype = factor_dtype(*(x.dtype for x in jax.tree.leaves((outputs, params))))
    nodes = _nodes(term, params)
    return Setting(term.graph, nodes, count, root.shape[0], cost, dtype.itemsize, rows)


def _nodes(term: Term, params: PyTree) -> tuple[Node, ...] | None:
    if not term.graph.model.loops:
        return term.graph.nodes
    with contextlib.suppress(LoopError):
        return build_graph(term.read, params, term.data, unroll=True).nodes
    return None


def period(refreshed: int, inversion: int, gradient: int) -> int:
    """Updates between refreshes of factors and inverses, so that they add at most `SHARE`."""
    least = math.ceil((refreshed + _INVERSION * inversion) / (SHARE * max(gradient, 1)))
    return min(max(least, 1), LONGEST)


def update_cost(
    factors: int, inversion: int, solve: int, gradient: int, linear: int, every: int
) -> float:
    """Of an update that refreshes factors and inverses every so often, in gradients.

    Beside those and the gradient there are the solve, the linear pass of two directions, and
    every fifth time the objective after the step.
    """
    refreshed = (factors + _INVERSION * inversion) / every
    return 1 + 1 / 15 + (solve + linear + refreshed) / max(gradient, 1)


def linear_cost(forward: int, examples: int) -> int:
    """Of the linear pass of two directions, each twice a forward pass, for the model's examples."""
    few = examples >= 2 * _MODEL_EXAMPLES
    return 4 * forward * (_MODEL_EXAMPLES if few else examples)


def solve_cost(layer: Layer) -> int:
    """Of the product of a layer's gradient with both inverses."""
    a, b = layer.activation_size, layer.d_out
    rows, columns = (-(-size // n) for size, n in zip((a, b), layer.splits, strict=True))
    return 2 * layer.stack * a * b * (columns + (1 if layer.indexed else rows))


def inversion_cost(layer: Layer) -> int:
    """Of the inverses of a layer's factors, or of the blocks on their diagonals."""
    sizes, splits = (layer.activation_size, layer.d_out), layer.splits
    q, g = (n * (-(-size // n)) ** 3 for size, n in zip(sizes, splits, strict=True))
    return layer.stack * ((sizes[0] if layer.indexed else q) + g)


def whole_sizes(at: Setting) -> list[tuple[int, int]]:
    """The size of every factor, and how many rows it has at most to be worth keeping whole.

    A solve takes `2 (a + b)` operations for each entry of a kernel, its gradient six for every
    row of the batch, which knows no more of a factor than so many rows.
    """
    found = []
    for layer in at.graph.layers.values():
        known = at.examples * max(layer.positions(slot) for slot in range(len(layer.slots)))
        sizes = (1 if layer.indexed else layer.activation_size), layer.d_out
        found += [(size, max(_KNOWN * known, _LEAST)) for size in sizes]
    return found


def split_at(sizes: list[tuple[int, int]]) -> int | None:
    """The rows above which factors are split, so that none is that is worth keeping whole."""
    large = [(size, most) for size, most in sizes if size > most]
    if not large:
        return None
    limit = max(min(most for _, most in large), *(size for size, most in sizes if size <= most), 1)
    return limit if max(large)[0] > limit else None


def moments_cost(at: Setting, layer: Layer, use: Use) -> int:
    """Of one column's moments of EKFAC: its way back, and gradients in the factors' eigenbasis."""
    form, places = use.form, use.form.positions
    rows, columns = layer.activation_size, layer.d_out
    turned = 2 * places * (columns**2 + (1 if layer.indexed else rows**2 + rows * columns))
    whole = 2 * rows * columns * (places + columns + (1 if layer.indexed else rows))
    return at.examples * (_product(use) + form.groups * min(turned, whole))


def use_cost(at: Setting, layer: Layer, use: Use) -> UseCost:
    form, product = use.form, _product(use)
    if use.input is None or not at.graph.is_active(use.input):
        product = 0  # no layer is before it
    summed = layer.indexed and layer.activation_size == 1 == form.turns == len(layer.uses)
    moment = 2 * form.groups * (1 if summed else form.positions) * form.d_out**2
    square = 1 if layer.indexed else 2 * use.width**2
    few = examples_for(layer, use, at.rows, "expand")
    looked_at = at.examples if few is None or 2 * few > at.examples else few
    return UseCost(
        activation=looked_at * form.groups * form.positions * square,
        column=at.examples * (moment + product),
        # Of one iteration of a loop; the product is that of all. With a kernel that data
        # chooses, every example has its own.
        congruence=product
        * (1 if use.choice is None else at.examples)
        * sum(size(v) for v in (use.input, use.output) if v is not None)
        // form.turns,
        columns=at.columns,
    )


def forward_cost(of: Node | Use) -> int:
    """Of one example, in a forward pass."""
    use = of.use if isinstance(of, Node) else of
    if use is None:
        return sum(_equation_cost(e) for e in of.equations if not keeps_order(e))
    return _product(use)


def _product(use: Use) -> int:
    """Of one example with the kernels; a position that data routes meets one of them."""
    form = use.form
    if form.indexed:
        return size(use.output)
    groups = form.groups if use.choice is None else 1
    return 2 * groups * form.positions * form.d_in * form.d_out


def values_cost(at: Setting) -> int:
    """Entries of all values of one example, those of every iteration of a loop that is kept."""
    if at.nodes is not None:
        return sum(size(value) for node in at.nodes for value in node.outputs)
    return sum(
        math.prod(1 if loop.once else loop.length for loop in around) * sum(map(size, e.outvars))
        for e, around in at.graph.model.every_equation
    )


def node_cost(node: Node, count: int, entry: int = 1) -> int:
    """Of a node between layers; a backward pass costs twice its equations.

    With `ENTRY` it is in FLOPs of products that take as long.
    """
    inside, outside = (sum(map(size, values)) for values in (node.inputs, node.outputs))
    if node.kind == "elementwise":
        return 2 * count * inside * outside
    passes = (inside + outside) * (1 if node.kind == "linear" else count)
    costs = (_equation_cost(e, entry) for e in node.equations if not keeps_order(e))
    return passes * 2 * sum(costs)


def _equation_cost(equation: Equation, entry: int = 1) -> int:
    entries = max(v.aval.size for v in equation.outvars)
    if equation.primitive.name != "dot_general":
        return entries * entry
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * entries * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
