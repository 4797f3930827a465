"""Random networks, losses, dtypes and options: what holds for all of them.

`KFGN_RANDOM_UPDATES=200` tries as many; what fails joins `CORPUS`.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kfgn

get = optax.tree_utils.tree_get
ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "squared": jnp.square,
    "none": lambda x: x,
}
LOSSES = {
    "squares": (kfgn.losses.half_squared_error, lambda y: y),
    "logits": (kfgn.losses.sigmoid_binary_cross_entropy, lambda y: (y > 0).astype(y.dtype)),
    "classes": (
        kfgn.losses.softmax_cross_entropy_with_integer_labels,
        lambda y: jnp.argmax(y, axis=-1),
    ),
}
CASES = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 4), min_size=2, max_size=3),
        "examples": st.integers(1, 5),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "loss": st.sampled_from(sorted(LOSSES)),
        "dtype": st.sampled_from(["float32", "float64"]),
        "bias": st.booleans(),
        "method": st.sampled_from(["kfra", "kflr"]),
        "scale": st.sampled_from([1e-4, 1.0, 1e4]),
        "options": st.fixed_dictionaries(
            {},
            optional={
                "inverse": st.just("eigen"),
                "momentum": st.just(False),
                "decay": st.sampled_from([None, 0.0, 0.99]),
                "factor_damping": st.just(1.0),
                "stagger": st.just(True),
            },
        ),
    }
)
#: The smallest there is, whose loss cannot fall: one class.
SMALLEST = {
    "widths": [1, 1], "examples": 1, "activation": "none", "loss": "classes", "dtype": "float32",
    "bias": False, "method": "kfra", "scale": 1.0, "options": {},
}  # fmt: skip
#: What failed once, of some hundred drawn cases each time, by what was wrong.
CORPUS = {
    "Q of fewer examples than rows, whose damping is below its roundoff": {
        **SMALLEST, "widths": [2, 2], "activation": "none", "loss": "squares", "bias": True,
        "method": "kflr", "scale": 1e8, "options": {"momentum": False, "stagger": True},
    },
    "saturated: no curvature but τ's, so that a step rose by less than it had promised to fall": {
        **SMALLEST, "widths": [4, 2], "examples": 3, "loss": "logits", "method": "kflr",
        "scale": 1e4, "options": {"decay": 0.99},
    },
    "saturated: a G of probabilities near one, less their squares, that was not semi-definite": {
        **SMALLEST, "widths": [3, 3], "examples": 5, "dtype": "float64", "scale": 1e4,
        "options": {"inverse": "eigen", "decay": None, "stagger": True},
    },
}  # fmt: skip


@settings(
    max_examples=int(os.environ.get("KFGN_RANDOM_UPDATES", "4")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(CASES)
@example(SMALLEST)
def test_an_update(case):
    """Exact gradient, factors that are semi-definite, a step that is finite and goes down."""
    if case["options"].get("stagger") and "factor_damping" in case["options"]:
        case["options"].pop("factor_damping")  # which searches
    check(case)


@pytest.mark.parametrize("wrong", CORPUS)
def test_what_failed_once(wrong):
    check(CORPUS[wrong])


def check(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        _check(case)


def _check(case):
    rng, dtype = np.random.default_rng(0), jnp.dtype(case["dtype"])
    act = ACTIVATIONS[case["activation"]]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    sizes = list(zip(case["widths"][:-1], case["widths"][1:], strict=True))
    params = [{"w": normal(a, b)} | ({"b": normal(b)} if case["bias"] else {}) for a, b in sizes]

    def model(params, x):
        for k, layer in enumerate(params):
            x = (act(x) if k else x) @ layer["w"] + (layer["b"] if case["bias"] else 0)
        return x

    loss, targets_of = LOSSES[case["loss"]]
    inputs = normal(case["examples"], case["widths"][0]) * case["scale"]
    batch = inputs, targets_of(normal(case["examples"], case["widths"][-1]))
    objective = kfgn.Objective(model, loss, l2=0.01)
    optimizer, curvature_fn = kfgn.make(
        objective, params, batch, method=case["method"], **case["options"]
    )

    @jax.jit
    def step(params, state, batch):
        found = (_, grads), curvature = curvature_fn(params, batch)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        truth = jax.value_and_grad(objective)(params, batch)
        return updates, state, found[0], truth, curvature.factors

    updates, state, found, truth, factors = step(params, optimizer.init(params), batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        # The same numbers in another order: some roundoffs of the largest term.
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * jnp.finfo(dtype).eps * _size(truth))
    for matrix in jax.tree.leaves(factors):
        largest = np.abs(matrix).max()
        if matrix.ndim > 1:
            np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=1e-6 * largest)
            assert np.linalg.eigvalsh(matrix)[0] >= -1e-5 * largest
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    assert int(get(state, "skipped")) == 0
    moved = optax.apply_updates(params, updates)
    assert float(objective(moved, batch)) <= 1.5 * float(truth[0])
    slope = sum(
        np.vdot(g, u)
        for g, u in zip(jax.tree.leaves(truth[1]), jax.tree.leaves(updates), strict=True)
    )
    assert slope <= 0 and float(get(state, "predicted_change")) <= 0


def _size(tree):
    return max(np.abs(x).max() for x in jax.tree.leaves(tree))
