"""Derivatives of nodes: Jacobians, each applied to blocks in its cheapest form, and curvature.

Every Jacobian comes from automatic differentiation; the classes differ only in
how they take the expectation over examples that the walk needs:

    left(o, i, X) = E[J_oi'] X,    congruence({M_op}, i, j) = sum_op E[J_oi' M_op J_pj].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base import linalg
from kfgn.base.devices import vary_like
from kfgn.base.errors import ModelError
from kfgn.base.linalg import cross_moment, matmul, sum_over_examples, total, weighed
from kfgn.base.types import Array, Scalar
from kfgn.model.graph.graph import Node
from kfgn.model.program.equations import Var, is_complex, size

PairBlocks = dict[tuple[Var, Var], Array]
Values = dict[Var, Array]

# With so many times fewer outputs than inputs, a product of rows is faster than their way back.
_FEW = 8


class Jacobian:
    """The Jacobian of a node in every example of the batch."""

    def left(self, o: Var, i: Var, block: Array) -> Array | None:
        """`E[J_oi'] block`, `[D_i, D_v]` from `[D_o, D_v]`; None for zero."""
        raise NotImplementedError

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array | None:
        """`sum_op E[J_oi' M_op J_pj]`, `[D_i, D_j]`; None for zero."""
        raise NotImplementedError

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        """The diagonal of `congruence(own, i, i)`; blocks may be diagonals themselves."""
        found = self.congruence(own, i, i)
        assert found is not None
        return jnp.diag(found)

    def gradient(self, outs: Values) -> Values:
        """Per-example gradients at the inputs from those at the outputs, `[N, ...]`."""
        raise NotImplementedError


def jacobian_of(
    node: Node, shared: Values, values: Values, importance: Array | None = None
) -> Jacobian:
    """The node's Jacobian at the given values, for means that are weighed by `importance`."""
    if any(map(is_complex, node.inputs + node.outputs)):
        raise ModelError(
            "a complex value is used before and after a layer, or is an output: the recursions "
            "carry real values only; take real and imaginary parts before the layer."
        )
    use = node.use
    if use is not None and use.order is None:
        (i,), (o,) = node.inputs, node.outputs
        kernel = shared[use.kernel_value]
        if use.form.matrix is not None:
            return _Matrix(i, use.signed(use.form.matrix(kernel)))
        if use.form.diagonal is not None and i.aval.shape == o.aval.shape:
            return Slopes({(o, i): use.signed(use.form.diagonal(kernel))[None]})
    if node.kind == "elementwise":
        return Slopes(elementwise_slopes(node, shared, values), importance)
    return _Pulled(node, shared, values, importance)


class _Matrix(Jacobian):
    """The same matrix for every example, `[D_in, D_out]`, of a node with one input and output."""

    def __init__(self, i: Var, matrix: Float[Array, "D_in D_out"]):
        self.input, self.matrix = i, matrix

    def left(self, o: Var, i: Var, block: Array) -> Array:
        return matmul(self.matrix.astype(block.dtype), block)

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        ((block),) = own.values()
        return linalg.congruence(self.matrix.astype(block.dtype), block)

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        ((block),) = own.values()
        return linalg.congruence_diagonal(self.matrix.astype(block.dtype), block)

    def gradient(self, outs: Values) -> Values:
        ((g),) = outs.values()
        rows = matmul(g.reshape(len(g), -1), self.matrix.astype(g.dtype).T)
        return {self.input: rows.reshape(-1, *self.input.aval.shape)}


class Slopes(Jacobian):
    """A diagonal per example, `[N, D]`, or for all, `[1, D]`: `E[J_i' M J_j] = M * (F_i'F_j / N)`.

    The slopes are by (output, input); each is kept times the root of its example's importance.
    """

    def __init__(self, slopes: PairBlocks, importance: Array | None = None):
        self.roots = None if importance is None else jnp.sqrt(importance)
        self.slopes = {pair: weighed(self.roots, slope) for pair, slope in slopes.items()}

    def _slope(self, o: Var, i: Var, block: Array) -> Array:
        return self.slopes[o, i].astype(block.dtype)

    def left(self, o: Var, i: Var, block: Array) -> Array:
        return jnp.mean(weighed(self.roots, self._slope(o, i, block)), axis=0)[:, None] * block

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        return total(
            block * cross_moment(self._slope(o, i, block), self._slope(p, j, block))
            for (o, p), block in own.items()
        )

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        parts = []
        for (o, p), block in own.items():
            slopes = self._slope(o, i, block) * self._slope(p, i, block)
            diagonal = jnp.diag(block) if block.ndim == 2 else block
            parts.append(diagonal * jnp.mean(slopes, axis=0))
        return total(parts)

    def gradient(self, outs: Values) -> Values:
        result: Values = {}
        for (o, i), slope in self.slopes.items():
            if o in outs:
                g = outs[o].reshape(len(outs[o]), -1)
                moved = (g * slope.astype(g.dtype)).reshape(-1, *i.aval.shape)
                result[i] = result[i] + moved if i in result else moved
        return result


class _Rows:
    """Rows times a node's Jacobian, `sum_o rows_o J_oi`, by one vector-Jacobian product per row.

    A product gives all inputs at once, and a walk asks for every pair of them: what was
    pulled before is known.
    """

    def __init__(self, node: Node, pull: Callable):
        self.node, self.pull = node, pull
        self.known: dict[Any, tuple[Values, Values]] = {}

    def __call__(self, rows: Values, i: Var, turned: bool = False) -> Array:
        """`[R, D_i]` from `[R, D_o]`, or from `[D_o, R]` if turned."""
        key = (turned, *((o, id(block)) for o, block in rows.items()))
        if key not in self.known:  # with the rows, whose ids stay theirs
            pulled = self._pulled({o: block.T if turned else block for o, block in rows.items()})
            self.known[key] = rows, pulled
        return self.known[key][1][i]

    def _pulled(self, rows: Values) -> Values:
        first = next(iter(rows.values()))
        pulled = jax.vmap(self.pull)(_cotangents(self.node, rows, len(first)))
        pairs = zip(self.node.inputs, pulled, strict=True)
        return {i: x.reshape(len(first), -1).astype(first.dtype) for i, x in pairs}


def _cotangents(node: Node, given: Values, *lead: int) -> list[Array]:
    """Those of all outputs, zero where none is given, with a leading axis if there is one."""
    shapes = {o: (*lead, *o.aval.shape) for o in node.outputs}
    cotangents = [
        given[o].astype(o.aval.dtype).reshape(shape)
        if o in given
        else jnp.zeros(shape, o.aval.dtype)
        for o, shape in shapes.items()
    ]
    return vary_like(cotangents, cotangents)


class _Pulled(Jacobian):
    """Vector-Jacobian products: per example, in chunks of bounded memory, or one for all."""

    def __init__(self, node: Node, shared: Values, values: Values, importance: Array | None):
        self.node, self.function = node, node.function(shared)
        operands = node.inputs + node.passive
        if node.kind in ("linear", "use"):  # the same everywhere, so at zero
            zeros = [jnp.zeros((1, *v.aval.shape), v.aval.dtype) for v in operands]
            self.arguments, importance = vary_like(zeros, list(values.values())), None
        else:
            self.arguments = [values[v] for v in operands]
        self.count, self.importance = len(self.arguments[0]), importance
        alone = self.count == 1 and importance is None
        self.one = self._rows([a[0] for a in self.arguments]) if alone else None

    def _rows(self, arguments: list[Array]) -> _Rows:
        split = len(self.node.inputs)
        inputs, passive = arguments[:split], arguments[split:]
        return _Rows(self.node, jax.vjp(lambda *x: self.function(*x, *passive), *inputs)[1])

    def _mean(self, of_rows: Callable[[_Rows], Array], entries: int) -> Array:
        """The mean over examples of `of_rows(rows_of_this_example)`."""
        if self.one is not None:
            return of_rows(self.one)

        def summed(given: tuple[list[Array], Array | None]) -> Array:
            arguments, importance = given
            found = jax.vmap(lambda one: of_rows(self._rows(one)))(arguments)
            return jnp.sum(weighed(importance, found), axis=0)

        given = self.arguments, self.importance
        return sum_over_examples(summed, given, 4 * entries) / self.count

    def left(self, o: Var, i: Var, block: Array) -> Array:
        entries = block.shape[1] * (size(o) + size(i))
        return self._mean(lambda rows: rows({o: block}, i, turned=True), entries).T

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        """By rows first, then columns; or as one product of rows, where there are few outputs."""
        outputs = dict.fromkeys(o for o, _ in own)
        behind = {o: {p: block for (q, p), block in own.items() if q is o} for o in outputs}
        if self.one is None and _FEW * sum(map(size, outputs)) <= size(i):
            return self._product(behind, i, j)

        def of_rows(rows: _Rows) -> Array:
            right = {o: rows(blocks, j) for o, blocks in behind.items()}
            return rows(right, i, turned=True)

        entries = (sum(map(size, self.node.outputs)) + size(i)) * size(j)
        # Turned once, not in each example: the sum over those goes through memory in order.
        return self._mean(of_rows, entries).T

    def _product(self, behind: dict[Var, Values], i: Var, j: Var) -> Array:
        """`sum_no J_noi' (M J)_noj / N` without a matrix of the inputs for every example."""

        def rows_of(arguments: list[Array]) -> tuple[Array, Array]:
            rows = self._rows(arguments)
            basis = {o: jnp.eye(size(o), dtype=_dtype(blocks)) for o, blocks in behind.items()}
            left = jnp.concatenate([rows({o: x}, i) for o, x in basis.items()])
            return left, jnp.concatenate([rows(blocks, j) for blocks in behind.values()])

        def summed(given: tuple[list[Array], Array | None]) -> Array:
            arguments, importance = given
            left, right = jax.vmap(rows_of)(arguments)
            left = weighed(importance, left).reshape(-1, size(i))
            return matmul(left.T, right.reshape(-1, size(j)))

        each = 4 * sum(map(size, behind)) * (size(i) + size(j))
        return sum_over_examples(summed, (self.arguments, self.importance), each) / self.count

    def gradient(self, outs: Values) -> Values:
        if self.one is not None:
            flat = {o: g.reshape(len(g), -1) for o, g in outs.items()}
            return {i: self.one(flat, i).reshape(-1, *i.aval.shape) for i in self.node.inputs}

        def one(arguments: list[Array], given: list[Array]) -> list[Array]:
            cotangents = _cotangents(self.node, dict(zip(outs, given, strict=True)))
            return self._rows(arguments).pull(cotangents)

        pulled = jax.vmap(one)(self.arguments, list(outs.values()))
        return dict(zip(self.node.inputs, pulled, strict=True))


def _dtype(blocks: Values) -> Any:
    return next(iter(blocks.values())).dtype


def batched_function(node: Node, shared: Values, values: Values) -> Callable[..., list[Array]]:
    """`(*inputs) -> outputs` with a leading batch axis."""
    function = node.function(shared)
    passive = [values[v] for v in node.passive]
    return lambda *x: jax.vmap(function)(*x, *passive)


def elementwise_slopes(node: Node, shared: Values, values: Values) -> PairBlocks:
    """The slopes of a node that acts entry by entry, `[N, D]` by (output, input)."""
    # By backward passes: functions with a `custom_vjp` rule have no others.
    inputs = [values[v] for v in node.inputs]
    outputs, pull = jax.vjp(batched_function(node, shared, values), *inputs)
    slopes: PairBlocks = {}
    for k, o in enumerate(node.outputs):
        ones = [jnp.ones_like(y) if p == k else jnp.zeros_like(y) for p, y in enumerate(outputs)]
        found = pull(ones)
        slopes |= {(o, i): s.reshape(len(s), -1) for i, s in zip(node.inputs, found, strict=True)}
    return slopes


def node_curvature(node: Node, shared: Values, values: Values, outs: Values) -> PairBlocks:
    """The mean over examples of the node's own Hessian against its output gradients.

    For an elementwise node these are the diagonals `f'' dE/da` of equation (10); for
    others, as examples are independent, one basis vector serves all of them.
    """
    if node.kind in ("linear", "use"):
        return {}
    batched = batched_function(node, shared, values)
    inputs = [values[v] for v in node.inputs]
    outputs = [(k, outs[o]) for k, o in enumerate(node.outputs) if o in outs]

    def against_gradient(*x: Array) -> Scalar:
        results = batched(*x)
        return total(jnp.sum(results[k] * g.astype(results[k].dtype)) for k, g in outputs)

    gradient = jax.grad(against_gradient, argnums=tuple(range(len(inputs))))

    def along(direction: Array, b: int) -> list[Array]:
        moved = [jnp.zeros_like(x) for x in inputs]
        moved[b] = jnp.broadcast_to(direction, moved[b].shape)
        second = jax.jvp(gradient, tuple(inputs), tuple(moved))[1]
        return [jnp.mean(s.reshape(len(s), -1), axis=0) for s in second]

    blocks: PairBlocks = {}
    for b, j in enumerate(node.inputs):
        if node.kind == "elementwise":
            columns = [jnp.diag(x) for x in along(jnp.ones((), inputs[b].dtype), b)]
        else:
            basis = jnp.eye(size(j), dtype=inputs[b].dtype).reshape(-1, *j.aval.shape)
            columns = [x.T for x in jax.vmap(along, (0, None))(basis, b)]
        blocks |= {(i, j): columns[a] for a, i in enumerate(node.inputs[: b + 1])}
    return blocks
