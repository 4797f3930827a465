"""The second-order terms that enter the Hessian between one layer and the next.

In the recursion down to a layer's pre-activation z, eq. (8), what the layers above
found is brought down by congruences, which keep it positive semi-definite, and one
term is added: with functions z_v of z that lead to the next layers' pre-activations

    T = sum_v sum_k  dE/dz_vk  d²z_vk/dz².

Where a transfer function σ follows and then the next layer, with inputs x = σ(z), T is
the diagonal matrix of `σ''(z_j) dE/dx_j`, whose signs eq. (87) of Veitch asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, PyTree
from kfgn.model.flat_model import Var, evaluate, read, size
from kfgn.model.graph import Graph
from kfgn.objective.objective import Objective

Values = dict[Var, Array]


def example_terms(
    objective: Objective, graph: Graph, params: PyTree
) -> Callable[[Any], dict[str, Array]]:
    """`(input, target) -> {use: T}` of one example, `[D, D]` in all entries of a use's output."""
    leaves, loss = named_leaves(params), objective.loss
    shared = graph.shared_values(leaves)
    variables = {name: use.output for name, use in graph.uses.items()}

    def terms(example):
        inputs, target = jax.tree.map(lambda a: a[None], example)

        def value(probes):
            outputs, _ = graph.forward(leaves, inputs, probes)
            return jnp.sum(jax.vmap(loss)(outputs, target)), outputs

        # Gradients at all pre-activations and at the outputs: where the sum over k ends.
        behind, outputs = jax.grad(value, has_aux=True)(graph.probes(1))
        ends = {variables[name]: gradient for name, gradient in behind.items()}
        last = loss.gradients(outputs, target)
        data = jax.tree.leaves(example[0])
        values = {**shared, **dict(zip(graph.model.inputs, data, strict=True))}

        def of(output: Var) -> Array:
            def total(change):
                return _against_gradients(graph, values, ends, last, output, change)

            return jax.hessian(total)(jnp.zeros(size(output), output.aval.dtype))

        return {name: of(output) for name, output in variables.items()}

    return terms


def _against_gradients(
    graph: Graph, values: Values, ends: Values, last: Array, own: Var, change: Array
) -> Array:
    """The next pre-activations times their gradients, where one of them changes."""
    env, total = dict(values), jnp.zeros((), change.dtype)
    for equation in graph.model.jaxpr.eqns:
        if all(v in values for v in equation.outvars):
            continue
        evaluate([equation], env)
        for v in equation.outvars:
            if v is own:
                env[v] = env[v] + change.reshape(env[v].shape)
            elif v in ends:  # the next layer: what lies behind it is not this term's
                total = total + _inner(ends[v], env[v], change.dtype)
                env[v] = jax.lax.stop_gradient(env[v])
    outputs = [read(env, v).reshape(-1).astype(change.dtype) for v in graph.model.outputs]
    return total + _inner(last, jnp.concatenate(outputs), change.dtype)


def _inner(a: Array, b: Array, dtype: Any) -> Array:
    return jnp.sum(a.reshape(-1).astype(dtype) * b.reshape(-1).astype(dtype))
