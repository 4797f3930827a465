"""Loops to a tolerance: made-up values, for which they never end, are given up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kfgn
from kfgn.base.errors import ModelError
from kfgn.model.trial.bounded import bounded
from kfgn.model.trial.independence import check_independent
from tests.tables.small import shapes

pytestmark = pytest.mark.loose_dtypes


def iterate(function, z):
    """Until nothing moves, which may be never."""

    def body(state):
        return function(state[0]), state[0]

    def moves(state):
        return jnp.max(jnp.abs(state[0] - state[1])) > 1e-5

    return jax.lax.while_loop(moves, body, (function(z), z))[0]


@jax.custom_vjp
def equilibrium(w, x):
    return iterate(lambda z: 3 * jnp.sin(5 * z @ w) + x, jnp.zeros_like(x))


def forward(w, x):
    z = equilibrium(w, x)
    return z, (w, x, z)


def backward(kept, g):
    w, x, z = kept
    _, pull = jax.vjp(lambda w, x, z: 3 * jnp.sin(5 * z @ w) + x, w, x, z)
    u = jax.lax.fori_loop(0, 40, lambda _, u: g + pull(u)[2], g)
    return pull(u)[:2]


equilibrium.defvjp(forward, backward)
P = {"w": jnp.eye(3) / 40, "out": jnp.ones((3, 2))}
X = jnp.linspace(0, 1, 12).reshape(4, 3)


def deep_equilibrium(p, x):
    return equilibrium(p["w"], x) @ p["out"]


def test_equilibrium_ends():
    """With parameters for which it never converges, and under transformations."""
    check_independent(deep_equilibrium, shapes(P), X)
    check_independent(jax.jit(jax.vmap(deep_equilibrium, (None, 0))), P, X)


def test_dependence_is_found_behind_a_loop():
    with pytest.raises(ModelError, match="not independent"):
        check_independent(lambda p, x: deep_equilibrium(p, x - jnp.mean(x, 0)), P, X)


def test_gradient():
    """It is read on one example; value and gradient are those of the user's function."""
    objective = kfgn.Objective(deep_equilibrium, kfgn.losses.half_squared_error)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "empirical", unassigned="gradient")
    batch = X, jnp.zeros((4, 2))
    found, _ = curvature_fn(P, batch)
    expected = jax.value_and_grad(objective)(P, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4)  # to the tolerance of the loop


def test_bounded_is_the_same_where_loops_end():
    def model(x):
        def body(x, k):
            y = jax.lax.while_loop(lambda y: jnp.sum(y) < 5, lambda y: 2 * y, x + k)
            return jax.lax.cond(k > 1, lambda y: iterate(jnp.cos, y), lambda y: y, y) / 4, y

        return jax.lax.scan(body, x, jnp.arange(3.0))

    closed = jax.make_jaxpr(model)(X[1])
    found = jax.extend.core.jaxpr_as_fun(bounded(closed))(X[1])
    for a, b in zip(found, jax.tree.leaves(model(X[1])), strict=True):
        assert jnp.allclose(a, b)
