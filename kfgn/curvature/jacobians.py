"""Jacobians of nodes, each applied to blocks of the curvature in its cheapest form.

Every Jacobian comes from automatic differentiation; the classes differ only in
how they take the expectation over examples that the walk needs:

    left(o, i, X) = E[J_oi'] X,    congruence({M_op}, i, j) = sum_op E[J_oi' M_op J_pj].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.devices import vary_like
from kfgn.base.errors import ModelError
from kfgn.base.linalg import (
    congruence,
    congruence_diagonal,
    cross_moment,
    matmul,
    sum_over_examples,
    total,
    weighed,
)
from kfgn.base.types import Array
from kfgn.model.equations import Var, is_complex, size
from kfgn.model.graph import Node

PairBlocks = dict[tuple[Var, Var], Array]
Values = dict[Var, Array]


class Jacobian(Protocol):
    """The Jacobian of a node in every example of the batch."""

    def left(self, o: Var, i: Var, block: Array) -> Array | None:
        """`E[J_oi'] block`, `[D_i, D_v]` from `[D_o, D_v]`; None for zero."""

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array | None:
        """`sum_op E[J_oi' M_op J_pj]`, `[D_i, D_j]`; None for zero."""

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        """The diagonal of `congruence(own, i, i)`; blocks may be diagonals themselves."""
        found = self.congruence(own, i, i)
        assert found is not None
        return jnp.diag(found)

    def gradient(self, outs: Values) -> Values:
        """Per-example gradients at the inputs from those at the outputs, `[N, ...]`."""


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
        kernel = shared[use.kernel_value]
        if use.form.matrix is not None:
            return _Matrix(node, use.signed(use.form.matrix(kernel)))
        same = all(i.aval.shape == o.aval.shape for i in node.inputs for o in node.outputs)
        if use.form.diagonal is not None and same:
            return _Diagonal(node, use.signed(use.form.diagonal(kernel)))
    if node.kind == "linear":
        return _Linear(node, shared, values)
    if node.kind == "elementwise":
        return _Elementwise(node, shared, values, importance)
    return _General(node, shared, values, importance)


class _Matrix:
    """The same matrix for every example, `[D_in, D_out]`."""

    def __init__(self, node: Node, matrix: Float[Array, "D_in D_out"]):
        self.node, self.kernel = node, matrix

    def _as(self, block: Array) -> Array:
        return self.kernel.astype(block.dtype)

    def left(self, o: Var, i: Var, block: Array) -> Array:
        return matmul(self._as(block), block)

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        ((matrix),) = own.values()
        return congruence(self._as(matrix), matrix)

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        ((matrix),) = own.values()
        return congruence_diagonal(self._as(matrix), matrix)

    def gradient(self, outs: Values) -> Values:
        ((g),) = outs.values()
        (i,) = self.node.inputs
        rows = g.reshape(g.shape[0], -1)
        return {i: matmul(rows, self._as(rows).T).reshape(-1, *i.aval.shape)}


class _Diagonal:
    """One slope per entry, the same for every example."""

    def __init__(self, node: Node, slope: Float[Array, " D"]):
        self.node, self.slope = node, slope

    def left(self, o: Var, i: Var, block: Array) -> Array:
        return self.slope.astype(block.dtype)[:, None] * block

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        ((matrix),) = own.values()
        slope = self.slope.astype(matrix.dtype)
        return slope[:, None] * matrix * slope[None, :]

    def congruence_diagonal(self, own: PairBlocks, i: Var) -> Array:
        ((matrix),) = own.values()
        diagonal = jnp.diag(matrix) if matrix.ndim == 2 else matrix
        return jnp.square(self.slope.astype(matrix.dtype)) * diagonal

    def gradient(self, outs: Values) -> Values:
        ((g),) = outs.values()
        (i,) = self.node.inputs
        flat = g.reshape(g.shape[0], -1) * self.slope.astype(g.dtype)
        return {i: flat.reshape(-1, *i.aval.shape)}


class _Linear(Jacobian):
    """The same vector-Jacobian product for every example."""

    def __init__(self, node: Node, shared: Values, values: Values):
        function = node.function(shared)
        # Offsets do not move a linear node's Jacobian: zeros stand for them.
        passive = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.passive]
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.inputs]
        zeros = vary_like(zeros, list(values.values()))
        self.node = node
        self.rows = _Rows(node, jax.vjp(lambda *x: function(*x, *passive), *zeros)[1])

    def left(self, o: Var, i: Var, block: Array) -> Array:
        return self.rows({o: block}, i, turned=True).T

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        return _congruence(own, self.rows, i, j)

    def gradient(self, outs: Values) -> Values:
        count = next(iter(outs.values())).shape[0]
        flat = {o: g.reshape(count, -1) for o, g in outs.items()}
        return {i: self.rows(flat, i).reshape(count, *i.aval.shape) for i in self.node.inputs}


class _Elementwise:
    """A diagonal per example: `E[J_i' M J_j] = M * (F_i'F_j / N)`."""

    def __init__(self, node: Node, shared: Values, values: Values, importance: Array | None):
        batched = batched_function(node, shared, values)
        inputs = [values[v] for v in node.inputs]
        self.roots = None if importance is None else jnp.sqrt(importance)
        self.slopes: PairBlocks = {}
        for k, i in enumerate(node.inputs):
            for o, slope in zip(node.outputs, along_ones(batched, inputs, k), strict=True):
                self.slopes[o, i] = weighed(self.roots, slope.reshape(slope.shape[0], -1))
        self.node = node

    def _slope(self, o: Var, i: Var, block: Array) -> Array:
        # One conversion per slope would break the symmetry test by identity.
        slope = self.slopes[o, i]
        return slope if slope.dtype == block.dtype else slope.astype(block.dtype)

    def left(self, o: Var, i: Var, block: Array) -> Array:
        mean = jnp.mean(weighed(self.roots, self._slope(o, i, block)), axis=0)
        return mean[:, None] * block

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
        result = {}
        for i in self.node.inputs:
            parts = [
                g * self.slopes[o, i].reshape(g.shape).astype(g.dtype) for o, g in outs.items()
            ]
            result[i] = total(parts).reshape(-1, *i.aval.shape)
        return result


class _General(Jacobian):
    """A vector-Jacobian product per example, in chunks of bounded memory."""

    def __init__(self, node: Node, shared: Values, values: Values, importance: Array | None):
        self.node = node
        self.function = node.function(shared)
        self.arguments = [values[v] for v in node.inputs + node.passive]
        self.count, self.importance = self.arguments[0].shape[0], importance
        self.rows: _Rows | None = None  # of the one example, where there is one

    def _pull(self, arguments: list[Array]) -> Callable:
        split = len(self.node.inputs)
        inputs, passive = arguments[:split], arguments[split:]
        return jax.vjp(lambda *x: self.function(*x, *passive), *inputs)[1]

    def _mean(self, of_rows: Callable[[_Rows], Array], entries: int) -> Array:
        """The mean over examples of `of_rows(rows_of_this_example)`."""

        def rows(arguments: list[Array]) -> _Rows:
            return _Rows(self.node, self._pull(arguments))

        if self.count == 1 and self.importance is None:
            self.rows = self.rows or rows([a[0] for a in self.arguments])
            return of_rows(self.rows)

        def summed(given: tuple[list[Array], Array | None]) -> Array:
            arguments, importance = given
            found = jax.vmap(lambda one: of_rows(rows(one)))(arguments)
            return jnp.sum(weighed(importance, found), axis=0)

        given = (self.arguments, self.importance)
        return sum_over_examples(summed, given, 4 * entries) / self.count

    def left(self, o: Var, i: Var, block: Array) -> Array:
        entries = block.shape[1] * (size(o) + size(i))
        return self._mean(lambda rows: rows({o: block}, i, turned=True).T, entries)

    def congruence(self, own: PairBlocks, i: Var, j: Var) -> Array:
        entries = sum(size(o) for o in self.node.outputs) * (size(i) + size(j))
        return self._mean(lambda rows: _congruence(own, rows, i, j), entries)

    def gradient(self, outs: Values) -> Values:
        present = list(outs)

        def one(arguments: list[Array], gradients: list[Array]) -> list[Array]:
            given = dict(zip(present, gradients, strict=True))
            return self._pull(arguments)(_cotangents(self.node, given))

        pulled = jax.vmap(one)(self.arguments, [outs[o] for o in present])
        return dict(zip(self.node.inputs, pulled, strict=True))


def batched_function(node: Node, shared: Values, values: Values) -> Callable[..., list[Array]]:
    """`(*inputs) -> outputs` with a leading batch axis."""
    function = node.function(shared)
    passive = [values[v] for v in node.passive]
    return lambda *x: jax.vmap(function)(*x, *passive)


def along_ones(function: Callable, inputs: list[Array], k: int) -> list[Array]:
    """Derivatives along ones at input number k: the slopes of what acts entry by entry."""
    ones = [jnp.ones_like(x) if p == k else jnp.zeros_like(x) for p, x in enumerate(inputs)]
    return jax.jvp(function, tuple(inputs), tuple(ones))[1]


def _cotangents(node: Node, given: Values, *lead: int) -> list[Array]:
    """Those of all outputs, zero where none is given, with a leading axis if there is one."""
    cotangents = [
        given[o].astype(o.aval.dtype).reshape(*lead, *o.aval.shape)
        if o in given
        else jnp.zeros((*lead, *o.aval.shape), o.aval.dtype)
        for o in node.outputs
    ]
    return vary_like(cotangents, cotangents)


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
            self.known[key] = (
                rows,
                self._pulled({o: block.T if turned else block for o, block in rows.items()}),
            )
        return self.known[key][1][i]

    def _pulled(self, rows: Values) -> Values:
        first = next(iter(rows.values()))
        pulled = jax.vmap(self.pull)(_cotangents(self.node, rows, len(first)))
        pairs = zip(self.node.inputs, pulled, strict=True)
        return {i: x.reshape(len(first), -1).astype(first.dtype) for i, x in pairs}


def _congruence(own: PairBlocks, rows: _Rows, i: Var, j: Var) -> Array:
    """`sum_op J_oi' M_op J_pj` of one example: rows first, then columns."""
    outputs = dict.fromkeys(o for o, _ in own)
    right = {o: rows({p: block for (q, p), block in own.items() if q is o}, j) for o in outputs}
    return rows(right, i, turned=True).T
