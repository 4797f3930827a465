"""Models with `custom_vjp` rules: one derivative for all verbs, methods and solvers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.base.trees import named_leaves

pytestmark = pytest.mark.usefixtures("x64")

COUNT = 5


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def calling_itself(x):
    return jnp.log1p(jnp.exp(x))


calling_itself.defvjp(lambda x: (calling_itself(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


def _fixed_point(step, start):
    """By a loop that jax does not differentiate backwards."""
    return jax.lax.while_loop(lambda c: c[1] < 60, lambda c: (step(c[0]), c[1] + 1), (start, 0))[0]


@jax.custom_vjp
def equilibrium(w, x):
    return _fixed_point(lambda z: jnp.tanh(0.3 * z @ w + x), jnp.zeros_like(x))


def _equilibrium_forward(w, x):
    z = _fixed_point(lambda z: jnp.tanh(0.3 * z @ w + x), jnp.zeros_like(x))
    return z, (w, x, z)


def _equilibrium_backward(residuals, g):
    w, x, z = residuals
    pull = jax.vjp(lambda z: jnp.tanh(0.3 * z @ w + x), z)[1]
    u = _fixed_point(lambda u: g + pull(u)[0], g)
    return jax.vjp(lambda w, x: jnp.tanh(0.3 * z @ w + x), w, x)[1](u)


equilibrium.defvjp(_equilibrium_forward, _equilibrium_backward)


def _between(function):
    def model(p, x):
        h = function(p, jnp.asarray(x) @ p["first"]["w"] + p["first"]["b"])
        return jnp.tanh(h @ p["out"]["w"] + p["out"]["b"])

    return model


PARAMS = {
    "first": {"w": numbers(0, 3, 4), "b": numbers(1, 4)},
    "out": {"w": numbers(2, 4, 2), "b": numbers(3, 2)},
}
BATCH = numbers(4, COUNT, 3), numbers(5, COUNT, 2)
MODELS: dict[str, Any] = {
    "straight_through": (_between(lambda p, h: straight_through(h)), PARAMS),
    "calling_itself": (_between(lambda p, h: calling_itself(h)), PARAMS),
    "equilibrium": (
        _between(lambda p, h: equilibrium(p["inner"], h)),
        {**PARAMS, "inner": numbers(6, 4, 4) / 2},
    ),
}


def close(found, expected):
    # Roundoff of some ten products.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def flat_of(params):
    return ravel_pytree(jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton(name):
    """`J'J` of the Jacobian that reverse mode gives, whatever is asked."""
    model, params = MODELS[name]
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    flat, unravel = flat_of(params)
    v = jnp.cos(jnp.arange(flat.size))

    @jax.jit
    def everything(flat):
        params, operator = unravel(flat), kfgn.gauss_newton(objective)
        jacobian = jax.jacrev(lambda f: model(unravel(f), BATCH[0]))(flat)
        _, curvature = kfgn.value_grad_and_curvature(objective, "kflr")(params, BATCH)
        pushed = curvature.linearized(named_leaves(unravel(v)))
        product = ravel_pytree(operator.matvec(params, BATCH, unravel(v)))[0]
        dense, blocks = operator.dense(params, BATCH), operator.blocks(params, BATCH)
        gradient = ravel_pytree(jax.tree.leaves(curvature.gradient))[0]
        true = jax.grad(lambda f: jnp.sum((model(unravel(f), BATCH[0]) - BATCH[1]) ** 2))(flat)
        return jacobian, pushed, product, dense, blocks, gradient, true / 2 / COUNT

    jacobian, pushed, product, dense, blocks, gradient, true = everything(flat)
    rows = jacobian.reshape(-1, flat.size)
    matrix = rows.T @ rows / COUNT
    close(pushed, jacobian @ v)
    close(product, matrix @ v)
    close(dense, matrix)
    close(sum(jnp.trace(b) for b in blocks.values()), jnp.trace(matrix))
    close(gradient, true)


@pytest.mark.parametrize("name", ["straight_through", "calling_itself"])
def test_hessian(name):
    """The derivative of the gradient, as jax gives it."""
    model, params = MODELS[name]
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    flat, unravel = flat_of(params)
    v = jnp.cos(jnp.arange(flat.size))

    def loss(flat):
        return jnp.sum((model(unravel(flat), BATCH[0]) - BATCH[1]) ** 2) / 2 / COUNT

    @jax.jit
    def everything(flat):
        params, operator = unravel(flat), kfgn.hessian(objective)
        # jax goes forwards through the rule of the first alone.
        of = jax.hessian if name == "straight_through" else lambda f: jax.jacrev(jax.jacrev(f))
        product = ravel_pytree(operator.matvec(params, BATCH, unravel(v)))[0]
        blocks, diagonals = operator.blocks(params, BATCH), operator.diagonal(params, BATCH)
        whole = operator.pre_activation(params, BATCH, reduce="mean")
        return of(loss)(flat), product, operator.dense(params, BATCH), blocks, diagonals, whole

    matrix, product, dense, blocks, diagonals, whole = everything(flat)
    close(product, matrix @ v)
    close(dense, matrix)
    places = named_leaves(unravel(jnp.arange(float(flat.size))))
    for layer, ours in blocks.items():
        order = [places[f"{layer}/{leaf}"].reshape(-1) for leaf in ("w", "b")]
        at = np.concatenate(order).astype(int)
        close(ours, matrix[np.ix_(at, at)])
        close(diagonals[layer].reshape(-1), np.diag(matrix)[at])
    bias = places["first/b"].astype(int)
    close(whole["first"], matrix[np.ix_(bias, bias)])
    if name == "straight_through":
        close(blocks["first"], 0)


def test_an_adaptive_solver_trains():
    """`odeint` differentiates backwards by solving again: nothing has to be transposed."""
    from jax.experimental.ode import odeint

    def flow(p, h):
        def one(h):
            times = jnp.array([0.0, 1.0])
            return odeint(lambda h, t, w: jnp.tanh(h @ w), h, times, p["inner"], rtol=1e-9)[-1]

        return jax.vmap(one)(h)

    model, params = _between(flow), {**PARAMS, "inner": numbers(6, 4, 4) / 2}
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    tx = kfgn.kfac(objective, params, BATCH)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfac")

    @jax.jit
    def step(params, state, key):
        (value, grads), curvature = curvature_fn(params, BATCH, key=key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state, value

    params, state, values = jax.tree.map(jnp.asarray, params), tx.init(params), []
    for key in jax.random.split(jax.random.key(0), 4):
        params, state, value = step(params, state, key)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
