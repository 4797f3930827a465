"""The Jacobian of a model as a linear map, forwards and backwards.

Functions with a `custom_vjp` rule have a derivative backwards only. Forwards
it is the transpose, `J v = d/du v'(J'u)`, the derivative of the backward pass
in its cotangent; where the backward pass itself has no derivative, as one with
a `while_loop`, one backward pass for every output gives `J v` a row at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.base.linalg import inner, map_examples
from kfgn.base.trees import batch_of
from kfgn.base.types import Array, PyTree
from kfgn.model.flatten.custom_vjp import holds_rule


class LinearPass(NamedTuple):
    """A model's outputs for a batch, and products with their Jacobian J in the parameters."""

    outputs: PyTree
    push: Callable[[PyTree], PyTree]  # v -> J v
    pull: Callable[[PyTree], PyTree]  # u -> J'u


def linear_pass(
    model: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree
) -> LinearPass:
    """The linear pass of `model(params, inputs)`; see above for one with a `custom_vjp` rule."""
    closed, shape = jax.make_jaxpr(model, return_shape=True)(params, inputs)
    if any(map(holds_rule, closed.jaxpr.eqns)):
        return backward_pass(model, params, inputs)
    tree = jax.tree.structure(shape)

    def traced(params: PyTree) -> PyTree:
        leaves = jax.tree.leaves((params, inputs))
        return jax.tree.unflatten(tree, jex.jaxpr_as_fun(closed)(*leaves))

    outputs, push = jax.linearize(traced, params)
    transposed = jax.linear_transpose(push, params)
    return LinearPass(outputs, push, lambda u: transposed(u)[0])


def only_backwards(function: Callable, *arguments: PyTree) -> bool:
    """Whether jax differentiates a function backwards only, for a `custom_vjp` rule in it."""
    return any(map(holds_rule, jax.make_jaxpr(function)(*arguments).jaxpr.eqns))


def backward_pass(
    model: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree
) -> LinearPass:
    """The same by backward passes alone."""
    outputs, pull = jax.vjp(lambda p: model(p, inputs), params)

    def push(v: PyTree) -> PyTree:
        try:
            _, transposed = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, outputs))
            return transposed(v)[0]
        except Exception:  # the backward pass has no derivative, or none that jax knows
            return _by_rows(model, params, inputs, v)

    return LinearPass(outputs, push, lambda u: pull(u)[0])


def _by_rows(model: Callable, params: PyTree, inputs: PyTree, v: PyTree) -> PyTree:
    def one(example: PyTree) -> PyTree:
        outputs, pull = jax.vjp(lambda p: model(p, batch_of(example)), params)
        leaves, tree = jax.tree.flatten(outputs)
        found = []
        for k, leaf in enumerate(leaves):

            def row(unit: Array, k: int = k, leaf: Array = leaf) -> Array:
                u = [unit.reshape(x.shape) if j == k else jnp.zeros_like(x)
                     for j, x in enumerate(leaves)]  # fmt: skip
                (gradient,) = pull(jax.tree.unflatten(tree, u))
                return inner(gradient, v).astype(leaf.dtype)

            units = jnp.eye(leaf.size, dtype=leaf.dtype)
            found.append(jax.lax.map(row, units).reshape(leaf.shape[1:]))
        return jax.tree.unflatten(tree, found)

    return map_examples(one, inputs)
