"""Decompositions of stacks, which LAPACK must see one matrix at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.base.decompositions import cholesky, eigh, eigvalsh, inverse_of_lower

TOLERANCE = 1e-12  # a few roundings of products of matrices of 5 rows, with entries of up to 30


def spd(*shape: int) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (*shape, 5, 5), jnp.float64)
    return x @ jnp.swapaxes(x, -1, -2) + jnp.eye(5, dtype=jnp.float64)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_of_stacks(shape, x64):
    matrices = spd(*shape)
    values, vectors = eigh(matrices)
    turned = np.swapaxes(vectors, -1, -2)
    np.testing.assert_allclose(vectors * values[..., None, :] @ turned, matrices, atol=TOLERANCE)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), atol=TOLERANCE)
    np.testing.assert_allclose(eigvalsh(matrices), values, atol=TOLERANCE)
    lower = cholesky(matrices)
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrices), atol=TOLERANCE)
    product = inverse_of_lower(lower) @ lower
    np.testing.assert_allclose(product, jnp.broadcast_to(jnp.eye(5), product.shape), atol=TOLERANCE)


def test_under_vmap(x64):
    """The same of stacks that `jax.vmap` makes, one into the other."""
    matrices = spd(2, 3)
    found = jax.vmap(jax.vmap(lambda x: eigh(x)[0]))(matrices)
    np.testing.assert_allclose(found, eigvalsh(matrices), atol=TOLERANCE)
    np.testing.assert_allclose(jax.vmap(cholesky)(matrices), cholesky(matrices), atol=TOLERANCE)


def model(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@pytest.mark.parametrize("inverse", ["factored", "eigen", "two-term"])
@pytest.mark.parametrize("split", [False, True], ids=["vmap", "split"])
def test_one_matrix_in_every_call_of_lapack(inverse, split):
    """Stacks at once, on as many cores, would stop for ever (jaxlib 0.10).

    They come of models trained at once, and of factors in blocks.
    """
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    batch = (jnp.ones((4, 40)), jnp.ones((4, 2)))
    if inverse == "two-term":
        objective = kfgn.sum_of({"one": objective, "other": objective})
        batch = {"one": batch, "other": batch}
    params = {"first": jnp.ones((40, 36)), "second": jnp.ones((36, 2))}
    limits = {"large_factors": "split", "factor_limit": 20} if split else {}
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfac", **limits)
    optimizer = kfgn.kfac(objective, params, batch, inverse=inverse, **limits)

    def step(params, state, key):
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        return optimizer.update(grads, state, params, curvature=curvature)

    state, key = optimizer.init(params), jax.random.key(0)
    given = params, state, key
    if not split:
        step, given = jax.vmap(step), jax.tree.map(lambda x: jnp.stack([x, x]), given)
    text = jax.jit(step).lower(*given).as_text()
    calls = re.findall(r"@lapack_\w+\(.*?\) \{.*?: \((tensor<[^>]*>)", text)
    assert calls
    assert all(shape.count("x") == 2 for shape in calls), calls
