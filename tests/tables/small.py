"""One small classifier, its batches and its training step, for the tests of transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfgn

INPUTS, HIDDEN, CLASSES = 4, 6, 3
L2 = 1e-3


def network(params: Any, inputs: jax.Array) -> jax.Array:
    """Logits of a network with one hidden layer."""
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def make_params(dtype: Any = jnp.float32, seed: int = 0) -> Any:
    """Initial parameters."""
    rng = np.random.default_rng([seed, 1])

    def layer(d_in, d_out):
        kernel = jnp.asarray(rng.normal(size=(d_in, d_out)) / d_in**0.5, dtype)
        return {"kernel": kernel, "bias": jnp.asarray(0.1 * rng.normal(size=d_out), dtype)}

    return {"hidden": layer(INPUTS, HIDDEN), "out": layer(HIDDEN, CLASSES)}


def make_batch(dtype: Any = jnp.float32, seed: int = 0, count: int = 32) -> Any:
    """Inputs and the labels that a fixed random rule gives them."""
    rng = np.random.default_rng([seed, 2])
    rule = np.random.default_rng(3).normal(size=(INPUTS, CLASSES))
    inputs = rng.normal(size=(count, INPUTS))
    return jnp.asarray(inputs, dtype), jnp.argmax(jnp.asarray(np.sin(inputs @ rule)), axis=1)


def shapes(tree: Any) -> Any:
    """The same tree, shapes and dtypes only."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


LOSS = kfgn.losses.softmax_cross_entropy_with_integer_labels
OBJECTIVE = kfgn.Objective(network, LOSS, l2=L2)


def make_step(tx: optax.GradientTransformation, method: str = "kfra", **options: Any) -> Callable:
    """`(params, state, batch, key) -> (params, state, loss)`, the step of a training loop."""
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE, method, **options)

    def step(params, state, batch, key=None):
        (loss, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return step


def assert_close(actual: Any, expected: Any, tolerance: float, roundoff: float = 0.0) -> None:
    """Two trees alike agree leaf by leaf, relative to the largest entry of a leaf.

    Scalars, which may be differences of larger numbers, agree to the roundoff of those.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        within = tolerance * max(1e-30, np.abs(b).max()) + (roundoff if b.ndim == 0 else 0)
        np.testing.assert_allclose(a, b, rtol=0, atol=within)


def assert_equal(actual: Any, expected: Any) -> None:
    """Two trees alike have the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
