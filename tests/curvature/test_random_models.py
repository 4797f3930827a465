"""Random models, beside dense truth; `KFGN_RANDOM_MODELS=200` tries as many."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables.random_models import draw

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.usefixtures("x64")]


@pytest.mark.parametrize("seed", range(int(os.environ.get("KFGN_RANDOM_MODELS", "4"))))
def test_random_model(seed):
    """Value, gradient, products with the Jacobian, both diagonals, with a key that is traced."""
    model, params, inputs, parts = draw(seed)
    loss = kfgn.losses.half_squared_error
    targets = jnp.ones(jax.eval_shape(model, params, inputs, jax.random.key(0)).shape)
    batch, method = (inputs, targets), ("kflr", "kfra")[seed % 2]
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def both(params, flat, key):
        def outputs(flat):
            return model(unravel(flat), inputs, key).reshape(len(inputs), -1)

        def value(flat):
            return jnp.mean(
                0.5 * jnp.sum((outputs(flat) - targets.reshape(len(inputs), -1)) ** 2, 1)
            )

        objective = kfgn.Objective(lambda p, x: model(p, x, key), loss)
        options = {"model_examples": None, "unassigned": "block"}
        found, curvature = kfgn.value_grad_and_curvature(objective, method, **options)(
            params, batch
        )
        expected, gradient = jax.value_and_grad(value)(flat)
        jacobian = jax.jacobian(outputs)(flat)
        diagonals = [
            ravel_pytree(of(objective).diagonal_by_parameter(params, batch))[0]
            for of in (kfgn.gauss_newton, kfgn.hessian)
        ]
        pushed = curvature.linearized(curvature.gradient)
        truth = (
            expected, gradient, jacobian @ gradient, jnp.sum(jacobian**2, (0, 1)) / len(inputs),
            jnp.diag(jax.hessian(value)(flat)),
        )  # fmt: skip
        return (found[0], ravel_pytree(found[1])[0], pushed, *diagonals), truth, curvature.factors

    found, truth, factors = both(params, flat, jax.random.key(seed))
    for a, b in zip(found, truth, strict=True):
        # Sums in another order, of terms up to some hundred times as large as their sum.
        np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()), err_msg=parts
        )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(factors))
