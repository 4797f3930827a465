"""Weights of a batch: what is refused, what moves nothing, and trainings and solvers with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn

LOSS = kfgn.losses.softmax_cross_entropy_with_integer_labels


def model(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


def problem(count=8):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 3))}
    x = jax.random.normal(keys[2], (count, 4))
    return params, x, jnp.argmax(x[:, :3], axis=1)


def close(found, expected, rtol, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


BAD = {
    "short": (jnp.ones(7), r"shape \(8,\), found shape \(7,\)"),
    "of positions": (jnp.ones((8, 2)), r"found shape \(8, 2\).*weights of positions belong"),
    "complex": (jnp.ones(8, jnp.complex64), "must be a real array.*dtype complex64"),
    "list": ([1.0] * 8, "must be a real array.*found a list"),
    "NaN": (jnp.ones(8).at[3].set(jnp.nan), "must be finite, found nan at 3"),
    "infinite": (np.array([1, 1, -np.inf, 1, 1, 1, 1, 1]), "must be finite, found -inf at 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights(name):
    """Eagerly, under jit and where only shapes are looked at."""
    params, x, labels = problem()
    weights, message = BAD[name]
    objective = kfgn.Objective(model, LOSS)
    batch = (x, labels, weights)
    with pytest.raises(kfgn.errors.BatchError, match=message):
        objective(params, batch)
    with pytest.raises(kfgn.errors.BatchError, match=message):
        kfgn.layers.find_blocks(objective, params, batch)
    if "finite" not in message and name != "list":
        with pytest.raises(kfgn.errors.BatchError, match=message):
            jax.eval_shape(kfgn.value_grad_and_curvature(objective), params, batch)


def test_bad_option_and_length():
    params, x, labels = problem()
    with pytest.raises(kfgn.errors.OptionError, match="mean_over"):
        kfgn.Objective(model, LOSS, mean_over="batch")
    with pytest.raises(kfgn.errors.BatchError, match=r"or \(inputs, targets, weights\), found.*4"):
        kfgn.Objective(model, LOSS)(params, (x, labels, labels, labels))


def test_none_is_no_weights():
    params, x, labels = problem()
    objective = kfgn.Objective(model, LOSS)
    assert objective(params, (x, labels, None)) == objective(params, (x, labels))


OPTIMIZERS = {
    "recipe": lambda o, p, b: kfgn.kfra(o, p, b),
    "kronecker": lambda o, p, b: kfgn.transforms.scale_by_kronecker(
        kfgn.layers.find_blocks(o, p, b)
    ),
    "quadratic": lambda o, p, b: kfgn.transforms.scale_by_quadratic_model(),
    "hessian free": lambda o, p, b: kfgn.transforms.scale_by_conjugate_gradient(o),
}


def _lasting(state):
    """A state without what counts and records its last update."""
    own = state if hasattr(state, "_fields") and "skipped" in state._fields else state[0]
    told = {"skipped", "streak", "metrics"}.intersection(own._fields)
    return own._replace(**dict.fromkeys(told, 0))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_no_weight_moves_nothing(name, l2):
    """As an empty batch; also with an l2, whose gradient alone would, and labels that are none."""
    params, x, labels = problem()
    objective = kfgn.Objective(model, LOSS, l2=l2)
    function = kfgn.value_grad_and_curvature(objective)
    optimizer = OPTIMIZERS[name](objective, params, (x, labels))

    @jax.jit
    def step(params, state, batch):
        (value, grads), curvature = function(params, batch)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return value, updates, state

    batch = (x, labels, jnp.ones(8))
    _, updates, state = step(params, optimizer.init(params), batch)
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    value, updates, still = step(params, state, (x, labels - 100, jnp.zeros(8)))
    np.testing.assert_allclose(value, objective.penalty(params), rtol=1e-6)
    assert not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    before, after = (jax.tree.leaves(_lasting(s)) for s in (state, still))
    counted = sum(bool(jnp.any(a != b)) for a, b in zip(before, after, strict=True))
    assert counted == (1 if name == "recipe" else 0)  # its `still`
    bad = (x, labels, jnp.ones(8).at[2].set(jnp.nan))
    _, updates, skipped = step(params, still, bad)
    assert not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    states = [s[0] if name == "recipe" else s for s in (still, skipped)]
    assert states[1].skipped == states[0].skipped + 1
    for a, b in zip(*(jax.tree.leaves(_lasting(s)) for s in (still, skipped)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("alias", ["kfra", "kflr", "kfac"])
def test_training_with_padded_batches_is_that_of_the_batches(alias):
    """Batches of several lengths, padded to one shape: the same run as with each its own shape."""
    params, x, labels = problem(26)
    lengths = (8, 5, 8, 5)
    starts = np.cumsum((0, *lengths))[:-1]
    objective = kfgn.Objective(model, LOSS, l2=1e-3)
    optimizer = getattr(kfgn, alias)(objective, params, (x[:8], labels[:8]))
    function = kfgn.value_grad_and_curvature(objective, alias)

    @jax.jit
    def step(params, state, batch, key):
        keyed = {"key": key} if alias == "kfac" else {}
        (value, grads), curvature = function(params, batch, **keyed)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    def padded(start, length):
        garbage, own = np.full((8, 4), np.nan, np.float32), np.full(8, -1)
        garbage[:length] = x[start : start + length]
        own[:length] = labels[start : start + length]
        return garbage, own, np.arange(8) < length

    def own(start, length):
        return x[start : start + length], labels[start : start + length]

    def run(make):
        at, state, values = params, optimizer.init(params), []
        for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            at, state, value = step(at, state, make(start, length), jax.random.key(k))
            values.append(float(value))
        return at, values

    (found, values), (expected, others) = run(padded), run(own)
    # In float32, where each step solves with matrices of condition 1e3 or so.
    np.testing.assert_allclose(values, others, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
    assert values[-1] < values[0]


@pytest.mark.usefixtures("x64")
def test_solvers_take_weights():
    params, x, labels = problem()
    weights = jnp.array([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 1.0])
    kept = jnp.flatnonzero(weights)
    objective = kfgn.Objective(model, LOSS, l2=0.05)
    small = (x[kept], labels[kept], weights[kept])
    both = ((x.at[1].set(jnp.inf), labels, weights), small)
    gradient = jax.grad(objective)(params, small)
    minima = [kfgn.solvers.minimize(objective, params, b, max_iterations=5).values for b in both]
    close(*minima, 1e-9, 0)

    @jax.jit
    def solved(params, batch):
        full, block = (
            kfgn.solvers.newton_direction(
                objective, params, batch, gradient, damping=0.1, structure=structure
            ).direction
            for structure in ("full", "block")
        )
        by_block, _ = kfgn.solvers.block_gauss_newton_direction(
            objective, params, batch, gradient, damping=0.1, tolerance=1e-12
        )
        return full, block, by_block

    close(*(solved(params, batch) for batch in both), 1e-9, 1e-10)


def test_random_keys_among_the_inputs():
    """Padding keys is taken, too."""
    params, x, labels = problem()

    def noisy(w, inputs):
        rows, keys = inputs
        return model(w, rows + jax.vmap(lambda k: jax.random.normal(k, (4,)))(keys))

    objective = kfgn.Objective(noisy, LOSS)
    inputs = (x, jax.random.split(jax.random.key(1), 8))
    weights = jnp.arange(8) < 5
    found = objective(params, (inputs, labels, weights))
    small = jax.tree.map(lambda a: a[:5], (inputs, labels))
    np.testing.assert_allclose(found, objective(params, small), rtol=1e-6)
