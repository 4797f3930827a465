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
import numpy as np

from kfgn.base.errors import ModelError
from kfgn.base.linalg import (
    congruence,
    congruence_diagonal,
    cross_moment,
    matmul,
    sum_over_examples,
)
from kfgn.model.flat_model import Array, Var, is_complex, size
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

    def gradient(self, outs: Values) -> Values:
        """Per-example gradients at the inputs from those at the outputs, `[N, ...]`."""


def jacobian_of(node: Node, shared: Values, values: Values) -> Jacobian:
    """The node's Jacobian at the given values."""
    if any(map(is_complex, node.inputs + node.outputs)):
        raise ModelError(
            "a complex value is used before and after a layer, or is an output: the recursions "
            "carry real values only; take real and imaginary parts before the layer."
        )
    if node.use is not None and node.use.order is None:
        form = node.use.form
        if form.kind == "dense" and form.groups * form.positions == 1:
            return _Dense(node, shared)
        same = all(i.aval.shape == o.aval.shape for i in node.inputs for o in node.outputs)
        if form.kind in ("scale", "shift") and same:
            return _Diagonal(node, shared)
    if node.kind == "linear":
        return _Linear(node, shared, values)
    if node.kind == "elementwise":
        return _Elementwise(node, shared, values)
    return _General(node, shared, values)


class _Dense:
    """`h = a W`: products with the kernel."""

    def __init__(self, node: Node, shared: Values):
        use = node.use
        assert use is not None and use.input is not None
        kernel = use.form.kernel(shared[use.kernel_value])[0]
        entries = np.arange(size(use.input)).reshape(1, *use.input.aval.shape)
        rows = np.argsort(use.form.activations(entries).reshape(-1))
        self.kernel = kernel if np.all(np.diff(rows) == 1) else kernel[rows]
        self.node = node

    def _as(self, block: Array) -> Array:
        return self.kernel.astype(block.dtype)

    def left(self, o, i, block):
        return matmul(self._as(block), block)

    def congruence(self, own, i, j):
        ((matrix),) = own.values()
        return congruence(self._as(matrix), matrix)

    def congruence_diagonal(self, own, i):
        ((matrix),) = own.values()
        return congruence_diagonal(self._as(matrix), matrix)

    def gradient(self, outs):
        ((g),) = outs.values()
        (i,) = self.node.inputs
        rows = g.reshape(g.shape[0], -1)
        return {i: matmul(rows, self._as(rows).T).reshape(-1, *i.aval.shape)}


class _Diagonal:
    """A scale or a shift: one slope per entry, the same for every example."""

    def __init__(self, node: Node, shared: Values):
        function = node.function(shared)
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.inputs]
        outputs, pull = jax.vjp(function, *zeros)
        (slope,) = pull([jnp.ones_like(o) for o in outputs])
        self.slope = slope.reshape(-1)
        self.node = node

    def left(self, o, i, block):
        return self.slope.astype(block.dtype)[:, None] * block

    def congruence(self, own, i, j):
        ((matrix),) = own.values()
        slope = self.slope.astype(matrix.dtype)
        return slope[:, None] * matrix * slope[None, :]

    def congruence_diagonal(self, own, i):
        ((matrix),) = own.values()
        diagonal = jnp.diag(matrix) if matrix.ndim == 2 else matrix
        return jnp.square(self.slope.astype(matrix.dtype)) * diagonal

    def gradient(self, outs):
        ((g),) = outs.values()
        (i,) = self.node.inputs
        flat = g.reshape(g.shape[0], -1) * self.slope.astype(g.dtype)
        return {i: flat.reshape(-1, *i.aval.shape)}


class _Linear:
    """The same vector-Jacobian product for every example."""

    def __init__(self, node: Node, shared: Values, values: Values):
        function = node.function(shared)
        # Offsets do not move a linear node's Jacobian: zeros stand for them.
        passive = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.passive]
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in node.inputs]
        self.pull = jax.vjp(lambda *x: function(*x, *passive), *zeros)[1]
        self.node = node

    def _rows(self, rows: dict[Var, Array], i: Var) -> Array:
        """`sum_o rows_o J_oi`, `[R, D_i]` from `[R, D_o]`."""
        return _pull_rows(self.node, self.pull, rows, i)

    def left(self, o, i, block):
        return self._rows({o: block.T}, i).T

    def congruence(self, own, i, j):
        return _congruence(own, self._rows, i, j)

    def congruence_diagonal(self, own, i):
        return jnp.diag(self.congruence(own, i, i))

    def gradient(self, outs):
        count = next(iter(outs.values())).shape[0]
        flat = {o: g.reshape(count, -1) for o, g in outs.items()}
        return {i: self._rows(flat, i).reshape(count, *i.aval.shape) for i in self.node.inputs}


class _Elementwise:
    """A diagonal per example: `E[J_i' M J_j] = M * (F_i'F_j / N)`."""

    def __init__(self, node: Node, shared: Values, values: Values):
        batched = batched_function(node, shared, values)
        inputs = [values[v] for v in node.inputs]
        self.slopes: dict[tuple[Var, Var], Array] = {}
        for position, i in enumerate(node.inputs):
            ones = [
                jnp.ones_like(x) if p == position else jnp.zeros_like(x)
                for p, x in enumerate(inputs)
            ]
            _, tangents = jax.jvp(batched, inputs, ones)
            for o, slope in zip(node.outputs, tangents, strict=True):
                self.slopes[o, i] = slope.reshape(slope.shape[0], -1)
        self.node = node

    def _slope(self, o: Var, i: Var, block: Array) -> Array:
        # One conversion per slope would break the symmetry test by identity.
        slope = self.slopes[o, i]
        return slope if slope.dtype == block.dtype else slope.astype(block.dtype)

    def left(self, o, i, block):
        return jnp.mean(self._slope(o, i, block), axis=0)[:, None] * block

    def congruence(self, own, i, j):
        return sum(
            block * cross_moment(self._slope(o, i, block), self._slope(p, j, block))
            for (o, p), block in own.items()
        )

    def congruence_diagonal(self, own, i):
        total: Any = 0.0
        for (o, p), block in own.items():
            slopes = self._slope(o, i, block) * self._slope(p, i, block)
            diagonal = jnp.diag(block) if block.ndim == 2 else block
            total = total + diagonal * jnp.mean(slopes, axis=0)
        return total

    def gradient(self, outs):
        result = {}
        for i in self.node.inputs:
            parts = [
                g * self.slopes[o, i].reshape(g.shape).astype(g.dtype) for o, g in outs.items()
            ]
            result[i] = sum(parts).reshape(-1, *i.aval.shape)
        return result


class _General:
    """A vector-Jacobian product per example, in chunks of bounded memory."""

    def __init__(self, node: Node, shared: Values, values: Values):
        self.node = node
        self.function = node.function(shared)
        self.arguments = [values[v] for v in node.inputs + node.passive]
        self.count = self.arguments[0].shape[0]

    def _mean(self, of_rows: Callable[[Callable], Array], entries: int) -> Array:
        """The mean over examples of `of_rows(rows_of_this_example)`."""

        def one(arguments):
            split = len(self.node.inputs)
            inputs, passive = arguments[:split], arguments[split:]
            pull = jax.vjp(lambda *x: self.function(*x, *passive), *inputs)[1]
            return of_rows(lambda rows, i: _pull_rows(self.node, pull, rows, i))

        if self.count == 1:
            return one([a[0] for a in self.arguments])

        def summed(arguments):
            return jnp.sum(jax.vmap(one)(arguments), axis=0)

        return sum_over_examples(summed, self.arguments, 4 * entries) / self.count

    def left(self, o, i, block):
        entries = block.shape[1] * (size(o) + size(i))
        return self._mean(lambda rows: rows({o: block.T}, i).T, entries)

    def congruence(self, own, i, j):
        entries = sum(size(o) for o in self.node.outputs) * (size(i) + size(j))
        return self._mean(lambda rows: _congruence(own, rows, i, j), entries)

    def congruence_diagonal(self, own, i):
        return jnp.diag(self.congruence(own, i, i))

    def gradient(self, outs):
        present = list(outs)

        def one(arguments, gradients):
            split = len(self.node.inputs)
            inputs, passive = arguments[:split], arguments[split:]
            pull = jax.vjp(lambda *x: self.function(*x, *passive), *inputs)[1]
            given = dict(zip(present, gradients, strict=True))
            return pull(
                [
                    given[o].astype(o.aval.dtype)
                    if o in given
                    else jnp.zeros(o.aval.shape, o.aval.dtype)
                    for o in self.node.outputs
                ]
            )

        pulled = jax.vmap(one)(self.arguments, [outs[o] for o in present])
        return dict(zip(self.node.inputs, pulled, strict=True))


def batched_function(node: Node, shared: Values, values: Values) -> Callable[..., list[Array]]:
    """`(*inputs) -> outputs` with a leading batch axis."""
    function = node.function(shared)
    passive = [values[v] for v in node.passive]
    return lambda *x: jax.vmap(function)(*x, *passive)


def _pull_rows(node: Node, pull: Callable, rows: dict[Var, Array], i: Var) -> Array:
    """`sum_o rows_o J_oi` by one vector-Jacobian product per row."""
    count = next(iter(rows.values())).shape[0]
    cotangents: list[Any] = []
    for o in node.outputs:
        if o in rows:
            cotangents.append(rows[o].astype(o.aval.dtype).reshape(count, *o.aval.shape))
        else:
            cotangents.append(jnp.zeros((count, *o.aval.shape), o.aval.dtype))
    pulled = jax.vmap(pull)(cotangents)[node.inputs.index(i)]
    return pulled.reshape(count, -1).astype(next(iter(rows.values())).dtype)


def _congruence(own: PairBlocks, rows: Callable, i: Var, j: Var) -> Array:
    """`sum_op J_oi' M_op J_pj` of one example: rows first, then columns."""
    outputs = dict.fromkeys(o for o, _ in own)
    right = {o: rows({p: block for (q, p), block in own.items() if q is o}, j) for o in outputs}
    return rows({o: block.T for o, block in right.items()}, i).T
