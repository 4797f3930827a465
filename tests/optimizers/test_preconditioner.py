"""The diagonals that precondition conjugate gradients, against dense truth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.optimizers.hessian_free import diagonal_solve
from tests.tables.small import L2, OBJECTIVE, assert_close, make_batch, make_params

LAMBDA = 0.25  # the state has it in float32
squared_error = kfgn.losses.half_squared_error


def by_scale(params, inputs):
    """A parameter for every output: a diagonal Jacobian."""
    return inputs * params["scale"]


def by_row(params, inputs):
    return inputs @ params["kernel"]


def stacked(params, inputs):
    """Slices of one kernel, a bias that they share, and a parameter in no layer."""
    hidden = inputs
    for k in range(2):
        hidden = jnp.tanh(hidden @ params["stack"][k] + params["shift"])
    return hidden * jnp.exp(params["scale"])


def numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def dense_diagonal(objective: kfgn.Objective, params: Any, batch: Any) -> Any:
    """`diag(J'HJ)` by jax.jacobian and jax.hessian, a pytree like params."""
    flat, unravel = ravel_pytree(params)
    inputs, targets = batch

    def diagonal(x):
        outputs = objective.model(unravel(x), inputs)
        jacobian = jax.jacobian(lambda y: objective.model(unravel(y), inputs))(x)
        hessian = jax.vmap(jax.hessian(objective.loss))(outputs, targets)
        return jnp.einsum("nkp,nkl,nlp->p", jacobian, hessian, jacobian) / len(inputs)

    return unravel(jax.jit(diagonal)(flat))


def network_problem() -> tuple:
    return OBJECTIVE, make_params(jnp.float64), make_batch(jnp.float64)


def stacked_problem() -> tuple:
    params = {"stack": numbers(2, 3, 3), "shift": jnp.zeros(3), "scale": jnp.zeros(3)}
    return kfgn.Objective(stacked, squared_error), params, (numbers(10, 3), numbers(10, 3))


@pytest.mark.parametrize("make", [network_problem, stacked_problem])
def test_gauss_newton_diagonal_is_the_dense_one(make, x64):
    objective, params, batch = make()
    found = jax.jit(kfgn.gauss_newton(objective).diagonal_by_parameter)(params, batch)
    assert_close(found, dense_diagonal(objective, params, batch), 1e-10)


def test_formula(x64):
    """`(diag(G) + (λ + η) I)^-power r`."""
    objective, params, batch = network_problem()
    diagonal = dense_diagonal(objective, params, batch)
    weights = {"a": diagonal["out"]["kernel"]}
    for power in (0.75, 1.0):
        solve = diagonal_solve(jnp.asarray(LAMBDA + L2), weights, power)
        expected = {"a": 1 / (np.asarray(weights["a"]) + LAMBDA + L2) ** power}
        assert_close(solve({"a": jnp.ones_like(weights["a"])}), expected, 1e-12)


def scale_problem() -> tuple:
    inputs = numbers(40, 6) * np.geomspace(0.1, 10, 6)
    return by_scale, {"scale": numbers(6)}, (inputs, numbers(40, 6)[::-1])


def one_hot_problem() -> tuple:
    """Every example has one input that is not zero, so Q of the layer is diagonal."""
    rows = jnp.eye(5)[np.arange(40) % 5] * numbers(40, 1)
    return by_row, {"kernel": numbers(5, 2)}, (rows, numbers(40, 2)[::-1])


@pytest.mark.parametrize("make", [scale_problem, one_hot_problem])
def test_a_diagonal_matrix_needs_one_iteration(make, x64):
    model, params, batch = make()
    objective = kfgn.Objective(model, squared_error, l2=0.01)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr")
    (_, grads), curvature = jax.jit(curvature_fn)(params, batch)
    iterations, directions = {}, {}
    exact = "gauss_newton_diagonal"
    for name, power in ((None, 1.0), (exact, 1.0), (exact, 0.5)):
        tx = kfgn.transforms.scale_by_conjugate_gradient(
            objective, damping=LAMBDA, tolerance=1e-10, preconditioner=name, power=power
        )
        direction, state = jax.jit(tx.update)(
            grads, tx.init(params), params, curvature=curvature, batch=batch
        )
        iterations[name, power] = int(state.iterations)
        directions[name, power] = direction
    assert iterations[exact, 1.0] == 1
    assert iterations[exact, 0.5] > 1 and iterations[None, 1.0] > 1
    diagonal = dense_diagonal(objective, params, batch)
    expected = jax.tree.map(lambda g, d: g / (d + LAMBDA + 0.01), grads, diagonal)
    for direction in directions.values():
        assert_close(direction, expected, 1e-8)


def test_what_it_needs():
    params, batch = make_params(), make_batch()
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE, "kflr"))(params, batch)
    tx = kfgn.transforms.scale_by_conjugate_gradient(
        OBJECTIVE, preconditioner="gauss_newton_diagonal"
    )
    with pytest.raises(
        kfgn.errors.OptionError, match=r"'gauss_newton_diagonal' needs .*batch=batch"
    ):
        tx.update(grads, tx.init(params), params, curvature=curvature)
    objective = kfgn.Objective(OBJECTIVE.model, OBJECTIVE.loss)
    with pytest.raises(kfgn.errors.OptionError, match="needs a positive damping, or l2"):
        kfgn.transforms.scale_by_conjugate_gradient(
            objective, damping=0.0, preconditioner="gauss_newton_diagonal"
        )


@pytest.mark.usefixtures("x64")
def test_empirical_fisher_where_kernels_are_shared():
    """Kernels used once, at many places, and twice, beside gradients by vmap."""

    def model(p, x):
        dims = ("NWC", "WIO", "NWC")
        h = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=dims)
        h = jnp.tanh(h.reshape(len(x), -1) @ p["once"]["kernel"] + p["once"]["bias"])
        return jnp.tanh(h @ p["tied"]) @ p["tied"]

    rng = np.random.default_rng(0)
    params = {
        "conv": rng.normal(size=(3, 2, 2)),
        "once": {"kernel": rng.normal(size=(8, 3)), "bias": rng.normal(size=3)},
        "tied": rng.normal(size=(3, 3)),
    }
    params = jax.tree.map(jnp.asarray, params)
    batch = jnp.asarray(rng.normal(size=(6, 4, 2))), jnp.asarray(rng.normal(size=(6, 3)))
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error, l2=0.1)
    found = jax.jit(kfgn.empirical_fisher(objective).diagonal_by_parameter)(params, batch)

    def one(x, y):
        return jax.grad(lambda p: objective.mean_loss(p, (x[None], y[None])))(params)

    each = jax.jit(jax.vmap(one))(*batch)
    truth = jax.tree.map(lambda g: jnp.mean(g**2, axis=0), each)
    # Sums of six products each: roundoff.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, truth)
