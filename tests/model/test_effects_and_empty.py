"""Equations without results, and values without entries, are read like any others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.model.graph.build_graph import build_graph

X = jnp.sin(jnp.arange(12.0)).reshape(3, 4)
Y = jnp.cos(jnp.arange(6.0)).reshape(3, 2)
PARAMS = {
    "first": {"w": jnp.cos(jnp.arange(20.0)).reshape(4, 5), "b": jnp.full(5, 0.1)},
    "out": {"w": jnp.sin(jnp.arange(10.0)).reshape(5, 2), "b": jnp.full(2, -0.2)},
}


def check_against_jax(model, params, inputs, unassigned="raise"):
    """Value, gradient, Hessian and Gauss-Newton matrix of the user's own batch function."""
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)

    def loss(params, inputs):
        return jnp.sum((model(params, inputs) - Y) ** 2) / 2 / len(Y)

    @jax.jit
    def truth(params, inputs):
        flat, unravel = ravel_pytree(params)
        jacobian = jax.jacobian(lambda flat: model(unravel(flat), inputs))(flat)
        jacobian = jacobian.reshape(-1, flat.size)
        return (
            jax.value_and_grad(loss)(params, inputs),
            jax.hessian(lambda flat: loss(unravel(flat), inputs))(flat),
            jacobian.T @ jacobian / len(Y),
        )

    @jax.jit
    def ours(params, batch):
        firsts = []
        for method in ("kfra", "kflr", "kfac", "empirical"):
            curvature = kfgn.value_grad_and_curvature(objective, method, unassigned=unassigned)
            key = {"key": jax.random.key(0)} if method == "kfac" else {}
            firsts.append(curvature(params, batch, **key)[0])
        operators = kfgn.hessian(objective), kfgn.gauss_newton(objective)
        return firsts, [operator.dense(params, batch) for operator in operators]

    (value, gradient), *matrices = truth(params, inputs)
    firsts, found = ours(params, (inputs, Y))
    for first in firsts:
        # Roundoff of some ten sums in float32.
        np.testing.assert_allclose(first[0], value, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(first[1]), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for ours, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(ours, matrix, rtol=1e-5, atol=1e-5)


# Effects.

seen: list[np.ndarray] = []


def watched(p, x):
    h = x @ p["first"]["w"]
    jax.debug.callback(lambda h: seen.append(np.asarray(h)), h)
    jax.debug.callback(lambda w: seen.append(np.asarray(w)), p["out"]["w"])
    h = jnp.tanh(h + p["first"]["b"])
    jax.debug.print("{h}", h=h)
    return h @ p["out"]["w"] + p["out"]["b"]


@pytest.mark.parametrize("model", [watched, jax.jit(watched), jax.checkpoint(watched)])
def test_effects(model):
    check_against_jax(model, PARAMS, X)


def test_effects_make_no_difference_to_layers():
    objective = kfgn.Objective(watched, kfgn.losses.half_squared_error)
    layers = build_graph(objective, PARAMS, X).layers
    assert {name: layer.parameters for name, layer in layers.items()} == {
        name: (f"{name}/w", f"{name}/b") for name in PARAMS
    }


@pytest.mark.parametrize("jit", [False, True])
def test_effects_run_once(jit, capfd):
    """For each example of the user's own values, and once for what all examples share."""
    objective = kfgn.Objective(watched, kfgn.losses.half_squared_error)
    curvature = kfgn.value_grad_and_curvature(objective, "kfra", model_examples=2)
    seen.clear()
    (jax.jit(curvature) if jit else curvature)(PARAMS, (X, Y))
    jax.effects_barrier()
    per_example = [x for x in seen if x.shape == (1, 5)]
    shared = [x for x in seen if x.shape == (5, 2)]
    assert len(per_example) == len(X) and len(shared) == 1 and len(seen) == len(X) + 1
    found = np.sort(np.concatenate(per_example), axis=0)
    np.testing.assert_allclose(found, np.sort(X @ PARAMS["first"]["w"], axis=0), rtol=1e-5)
    assert capfd.readouterr().out.count("[[") == len(X)


# Values without entries.

EMPTY = {
    "hidden": (
        {"w": jnp.ones((4, 0)), "v": jnp.ones((0, 2)), "b": jnp.ones(2)},
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] + p["b"],
        X,
    ),
    "input": (
        {"w": jnp.ones((0, 2)), "b": jnp.ones(2)},
        lambda p, x: x @ p["w"] + p["b"],
        jnp.ones((3, 0)),
    ),
    "parameter": ({"w": jnp.ones((4, 2)), "none": jnp.ones(0)}, lambda p, x: x @ p["w"], X),
    "sequence": (
        {"w": jnp.ones((4, 2)), "u": jnp.ones((3, 2))},
        lambda p, x: jnp.tanh(x[0] @ p["w"]) + jnp.sum(x[1] @ p["u"], axis=1),
        (X, jnp.ones((3, 0, 3))),
    ),
    "part": (
        {"w": jnp.ones((4, 2))},
        lambda p, x: jnp.concatenate([x[:, :0], jnp.sin(x)], 1) @ p["w"],
        X,
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty(name):
    """A parameter without entries needs no block; one that meets no data has none."""
    params, model, inputs = EMPTY[name]
    unassigned = "gradient" if name == "sequence" else "raise"
    check_against_jax(model, params, inputs, unassigned)


@pytest.mark.parametrize("unassigned", ["raise", "diagonal", "gradient"])
def test_empty_layer_is_trained_around(unassigned):
    params, model, inputs = EMPTY["hidden"]
    batch = inputs, Y
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    tx = kfgn.kfra(objective, params, batch, unassigned=unassigned)
    found = kfgn.value_grad_and_curvature(objective, "kfra", unassigned=unassigned)(params, batch)
    (_, gradient), curvature = found
    updates, _ = tx.update(gradient, tx.init(params), params, batch=batch, curvature=curvature)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    # The one block, of the bias, has the identity as its curvature, and the step is downhill.
    assert jnp.all(updates["b"] * gradient["b"] < 0)
