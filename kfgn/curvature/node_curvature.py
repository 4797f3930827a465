"""The curvature a node adds of its own: its second derivatives against the gradient behind it.

For an elementwise node these are the diagonals `f'' dE/da` of equation (10).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kfgn.base.linalg import total
from kfgn.base.types import Array, Scalar
from kfgn.curvature.jacobians import PairBlocks, Values, along_ones, batched_function
from kfgn.model.equations import size
from kfgn.model.graph import Node


def node_curvature(node: Node, shared: Values, values: Values, outs: Values) -> PairBlocks:
    """The mean over examples of the node's own Hessian against its output gradients."""
    if node.use is not None or node.kind == "linear":
        return {}
    batched = batched_function(node, shared, values)
    inputs = [values[v] for v in node.inputs]
    outputs = [(k, outs[o]) for k, o in enumerate(node.outputs) if o in outs]

    def against_gradient(*x: Array) -> Scalar:
        results = batched(*x)
        return total(jnp.sum(results[k] * g.astype(results[k].dtype)) for k, g in outputs)

    gradient = jax.grad(against_gradient, argnums=tuple(range(len(inputs))))
    if node.kind == "elementwise":
        return _elementwise_curvature(node, gradient, inputs)
    return _general_curvature(node, gradient, inputs)


def _elementwise_curvature(node: Node, gradient: Callable, inputs: list[Array]) -> PairBlocks:
    blocks = {}
    for b, j in enumerate(node.inputs):
        second = along_ones(gradient, inputs, b)
        for a, i in enumerate(node.inputs[: b + 1]):
            blocks[i, j] = jnp.diag(jnp.mean(second[a].reshape(second[a].shape[0], -1), axis=0))
    return blocks


def _general_curvature(node: Node, gradient: Callable, inputs: list[Array]) -> PairBlocks:
    """By forward over reverse; examples are independent, so one basis vector serves all."""
    blocks = {}
    for b, j in enumerate(node.inputs):
        basis = jnp.eye(size(j), dtype=inputs[b].dtype).reshape(-1, *j.aval.shape)

        def along(direction: Array, b: int = b) -> list[Array]:
            tangents = tuple(
                jnp.broadcast_to(direction, x.shape) if p == b else jnp.zeros_like(x)
                for p, x in enumerate(inputs)
            )
            _, second = jax.jvp(gradient, tuple(inputs), tangents)
            return [jnp.mean(s.reshape(s.shape[0], -1), axis=0) for s in second]

        columns = jax.vmap(along)(basis)
        for a, i in enumerate(node.inputs[: b + 1]):
            blocks[i, j] = columns[a].T
    return blocks
