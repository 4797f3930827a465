"""Factors are computed at the updates that observe them, and at no others."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.curvature import batch as measuring
from tests.tables.contract import by_layer
from tests.tables.small import (
    OBJECTIVE,
    assert_close,
    assert_equal,
    make_batch,
    make_params,
    make_step,
)

EVERY = 4
UPDATES = 18
DUE = [*range(10), 12, 16]  # of the updates from 0: the first ten, and every fourth


def kronecker(**options: Any) -> optax.GradientTransformationExtraArgs:
    blocks = kfgn.layers.find_blocks(OBJECTIVE, make_params(), make_batch())
    return kfgn.transforms.scale_by_kronecker(blocks, 0.1, **options)


def recipe(method: str = "kfra", **options: Any) -> optax.GradientTransformationExtraArgs:
    options = {"refresh_factors_every": EVERY, **options}
    return getattr(kfgn, method)(OBJECTIVE, make_params(), make_batch(), **options)


TRANSFORMATIONS = {
    "kfra": lambda: ("kfra", recipe()),
    "kflr": lambda: ("kflr", recipe("kflr", inverse="eigen")),
    "kfac": lambda: ("kfac", recipe("kfac")),
    "kronecker": lambda: ("kfra", kronecker(refresh_factors_every=EVERY)),
    "traced": lambda: (
        "kfra",
        optax.inject_hyperparams(kfgn.kfra, static_args="objective")(
            OBJECTIVE, make_params(), make_batch(), refresh_factors_every=EVERY
        ),
    ),
    "apply_if_finite": lambda: ("kfra", optax.apply_if_finite(recipe(), 3)),
    "partition": lambda: (
        "kfra",
        optax.partition({"a": recipe(), "b": optax.sgd(0.1)}, by_layer(hidden="b", out="a")),
    ),
}


@pytest.fixture
def counted(monkeypatch):
    """How many activation factors and G's were computed, layer by layer, when run."""
    counts = {"activation": 0, "pre_activation": 0}

    def add(name: str) -> None:
        counts[name] += 1

    def counting(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            jax.debug.callback(functools.partial(add, name))
            return function(*args, **options)

        return run

    q = counting("activation", measuring.activation_moments)
    monkeypatch.setattr(measuring, "activation_moments", q)
    for method in kfgn.curvature.methods.METHODS.values():
        g = counting("pre_activation", method.moments)
        monkeypatch.setattr(type(method), "moments", lambda self, request, g=g: g(request))
    return counts


@pytest.mark.loose_dtypes  # optax's wrappers
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("jits", [1, 2])
def test_factors_are_computed_where_they_are_due(name, jits, counted):
    method, tx = TRANSFORMATIONS[name]()
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE, method)
    update = tx.update
    if jits == 2:
        curvature_fn, update = jax.jit(curvature_fn), jax.jit(update)

    def step(params, state, batch, key):
        keys = {"key": key} if method == "kfac" else {}
        (_, grads), curvature = curvature_fn(params, batch, **keys)
        updates, state = update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jits == 1 else step
    params, found = make_params(), []
    state = tx.init(params)
    for k in range(UPDATES):
        before = dict(counted)
        params, state = step(params, state, make_batch(seed=k % 3), jax.random.key(k))
        jax.effects_barrier()
        found.append(tuple(counted[n] - before[n] for n in counted))
    layers = len(make_params())
    assert found == [(layers, 1) if k in DUE else (0, 0) for k in range(UPDATES)]
    get = functools.partial(optax.tree_utils.tree_get, state)
    assert int(get("observed")) == len(DUE) and np.isfinite(get("loss"))


@pytest.mark.parametrize("make", [recipe, kronecker], ids=["recipe", "kronecker"])
def test_average_counts_observations(make, x64):
    """Its weights are `max(0.09, 1/t)` of the t-th batch observed; the others leave no trace."""
    tx = make(refresh_factors_every=EVERY, decay=0.91)
    params = make_params(jnp.float64)
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))
    update, state, expected, seen = jax.jit(tx.update), tx.init(params), None, 0
    for k in range(UPDATES):
        (_, grads), curvature = curvature_fn(params, make_batch(jnp.float64, seed=k))
        _, state = update(grads, state, params, curvature=curvature)
        if k in DUE:
            seen += 1
            beta, new = min(0.91, 1 - 1 / seen), curvature.factors
            old = expected or new
            expected = jax.tree.map(lambda a, b, c=beta: c * a + (1 - c) * b, old, new)
        # The weights are float32, as all numbers of a state.
        assert_close(optax.tree_utils.tree_get(state, "factors"), expected, 1e-6)


@pytest.mark.parametrize("make", [recipe, kronecker], ids=["recipe", "kronecker"])
def test_every_update_is_the_same_by_loop_and_without(make):
    """A period that is traced goes through the loop, the number 1 does not."""
    params = make_params()
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))
    by_loop = jax.jit(
        lambda every, g, s, p, c: make(refresh_factors_every=every).update(g, s, p, curvature=c)
    )
    tx = make(refresh_factors_every=1)
    update, state = jax.jit(tx.update), tx.init(params)
    for k in range(3):
        (_, grads), curvature = curvature_fn(params, make_batch(seed=k))
        looped = by_loop(jnp.int32(1), grads, state, params, curvature)
        updates, state = update(grads, state, params, curvature=curvature)
        assert_close(looped, (updates, state), 1e-5)


@pytest.mark.parametrize("make", [recipe, kronecker], ids=["recipe", "kronecker"])
def test_factors_that_are_not_finite_never_enter(make):
    tx, params = make(refresh_factors_every=EVERY), make_params()
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))
    get = optax.tree_utils.tree_get
    update, state = jax.jit(tx.update), tx.init(params)
    skipped = 0
    for k in range(UPDATES):
        (_, grads), curvature = curvature_fn(params, make_batch(seed=k))
        broken = curvature.with_factors(
            jax.tree.map(lambda f: f.at[0, 0].set(jnp.inf), curvature.factors)
        )
        updates, moved = update(grads, state, params, curvature=broken)
        if k in DUE:  # found, and the next batch is looked at instead
            skipped += 1
            assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
            assert_equal(
                [get(moved, n) for n in ("factors", "observed", "count", "inverses")],
                [get(state, n) for n in ("factors", "observed", "count", "inverses")],
            )
            _, state = update(grads, moved, params, curvature=curvature)
        else:  # not looked at
            expected = update(grads, state, params, curvature=curvature)
            assert_equal((updates, moved), expected)
            state = moved
        assert int(get(state, "skipped")) == skipped and int(get(state, "count")) == k + 1
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(get(state, "factors")))


def test_two_trainings_at_once_compute_no_more(counted):
    """Under `vmap` the loop stays one."""
    tx = recipe()
    step = jax.jit(jax.vmap(make_step(tx)))
    several = [(make_params(seed=seed), make_batch(seed=seed)) for seed in range(2)]
    params, batches = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    states = jax.vmap(tx.init)(params)
    found = []
    for _ in range(14):
        before = counted["activation"]
        params, states, _ = step(params, states, batches)
        jax.effects_barrier()
        found.append(counted["activation"] > before)
    assert found == [k in DUE for k in range(14)]


def test_failed_inversion_begins_a_new_average():
    """Ten observations in a row follow, as at the start."""
    tx, params = recipe(), make_params()
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))
    (_, grads), curvature = curvature_fn(params, make_batch())
    indefinite = jax.tree.map(lambda f: -1e3 * jnp.eye(len(f)), curvature.factors)
    get, update = optax.tree_utils.tree_get, jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params, curvature=curvature)
    for _ in range(4):  # the fifth update inverts
        _, state = update(grads, state, params, curvature=curvature)
    _, state = update(grads, state, params, curvature=curvature.with_factors(indefinite))
    assert int(get(state, "count")) == 0 == int(get(state, "observed"))
    _, state = update(grads, state, params, curvature=curvature)
    assert int(get(state, "observed")) == 1
    assert_equal(get(state, "factors"), curvature.factors)


@pytest.mark.parametrize("make", [recipe, kronecker], ids=["recipe", "kronecker"])
@pytest.mark.parametrize("wrong", [0, 1.5])
def test_wrong_period(make, wrong):
    with pytest.raises(kfgn.errors.OptionError, match="refresh_factors_every must be a whole"):
        make(refresh_factors_every=wrong)
