"""Every transformation, alone and inside optax's wrappers, keeps the same contract."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from tests.tables.contract import (
    UPDATES,
    Case,
    Record,
    by_layer,
    check_jit_equals_no_jit,
    check_loss_falls,
    check_state_is_named_tuples_of_arrays,
    check_structure_is_stable,
    descend,
    measure,
    parametrize,
    train,
)
from tests.tables.small import (
    L2,
    OBJECTIVE,
    assert_close,
    assert_equal,
    make_batch,
    make_params,
    make_step,
    shapes,
)

ADAPTS = 5  # an update at which both dampings adapt

# Shapes are all that a factory needs.
SHAPES = (shapes(make_params()), shapes(make_batch()))
CONCRETE = (make_params(), make_batch())
BLOCKS = kfgn.layers.find_blocks(OBJECTIVE, *SHAPES)


def recipe(alias: str = "kfra", **options: Any) -> optax.GradientTransformationExtraArgs:
    return getattr(kfgn, alias)(OBJECTIVE, *SHAPES, **options)


def kronecker(damping: Any = 0.1, **options: Any) -> optax.GradientTransformationExtraArgs:
    return kfgn.transforms.scale_by_kronecker(BLOCKS, damping, **options)


def curvature_parts() -> optax.GradientTransformationExtraArgs:
    return kfgn.transforms.scale_by_curvature(
        BLOCKS,
        factor_damping=kfgn.transforms.Greedy(1.0, 1e-4, 1e4, period=ADAPTS - 1),
        step_damping=kfgn.transforms.LevenbergMarquardt(1.0, 0.0, 1e4, period=ADAPTS),
        momentum=False,
    )


inject = optax.inject_hyperparams

CASES = {
    "kfra": Case(recipe),
    "kflr": Case(lambda: recipe("kflr"), "kflr"),
    "kfac": Case(lambda: recipe("kfac"), "kfac"),
    "paper preset": Case(
        lambda: recipe(**kfgn.transforms.PRESETS["paper"]), falls_to=0.99
    ),  # τ starts at 150
    "no momentum, each batch's factors, refresh always": Case(
        lambda: recipe(momentum=False, decay=None, refresh_inverse_every=1)
    ),
    "average": Case(
        lambda: recipe(average_decay=0.95, learning_rate=optax.linear_schedule(1.0, 0.1, UPDATES))
    ),
    "factors every 4": Case(lambda: recipe("kflr", refresh_factors_every=4), "kflr"),
    "kronecker, factors every 4": Case(
        lambda: optax.chain(kronecker(refresh_factors_every=4), optax.scale(-0.5))
    ),
    "refresh eigen every 5": Case(lambda: recipe(refresh_inverse_every=5, inverse="eigen")),
    "ekfac, factors every 4": Case(
        lambda: recipe("kflr", refresh_factors_every=4, inverse="ekfac"), "kflr ekfac"
    ),
    "fixed dampings": Case(
        lambda: recipe(
            step_damping=kfgn.transforms.Fixed(2.0), factor_damping=kfgn.transforms.Fixed(1.0)
        )
    ),
    "scale_by_curvature": Case(lambda: optax.chain(curvature_parts(), descend())),
    "scale_by_kronecker": Case(lambda: optax.chain(kronecker(), optax.scale(-0.5))),
    "kronecker and quadratic": Case(
        lambda: optax.chain(kronecker(), kfgn.transforms.scale_by_quadratic_model(0.1), descend())
    ),
    "adam and quadratic": Case(
        lambda: optax.chain(
            optax.scale_by_adam(),
            kfgn.transforms.scale_by_quadratic_model(0.1, momentum=True),
            descend(),
        ),
        strict=False,
    ),
    "multi_steps": Case(lambda: kfgn.transforms.multi_steps(recipe(), BLOCKS, 2)),
    "kronecker in a trust region": Case(
        lambda: optax.chain(kronecker(), optax.scale(-0.5), kfgn.transforms.clip_by_curvature(1e-2))
    ),
    "no longer than before": Case(
        lambda: optax.chain(
            kronecker(), optax.scale(-0.5), kfgn.transforms.clip_by_past_steps(1.5, decay=0.5)
        )
    ),
    "average_parameters": Case(
        lambda: optax.chain(optax.sgd(1.0), kfgn.transforms.average_parameters())
    ),
    "clip": Case(lambda: optax.chain(optax.clip_by_global_norm(0.1), recipe())),
    "weight decay": Case(
        lambda: optax.chain(
            kronecker(inverse="eigen", decay=None),
            optax.add_decayed_weights(1e-2),
            optax.scale(-0.5),
        )
    ),
    "masked": Case(
        lambda: optax.chain(
            optax.masked(kronecker(refresh_factors_every=4), by_layer(hidden=False, out=True)),
            descend(),
        )
    ),
    "partition": Case(
        lambda: optax.partition(
            {"second": recipe(refresh_factors_every=4), "first": optax.adam(0.02)},
            by_layer(hidden="second", out="first"),
        ),
        strict=False,
    ),
    "inject schedule": Case(
        lambda: optax.chain(
            inject(kfgn.transforms.scale_by_kronecker)(BLOCKS, optax.linear_schedule(1.0, 0.1, 10)),
            optax.scale(-0.5),
        )
    ),
    "inject quadratic": Case(
        lambda: optax.chain(
            kronecker(), inject(kfgn.transforms.scale_by_quadratic_model)(0.1), descend()
        )
    ),
    "inject learning rate": Case(
        lambda: inject(
            lambda learning_rate: kfgn.kfra(OBJECTIVE, *CONCRETE, learning_rate=learning_rate)
        )(0.5)
    ),
    "inject into the alias": Case(
        lambda: inject(kfgn.kfra, static_args="objective")(
            OBJECTIVE, *CONCRETE, learning_rate=0.5, step_damping=1.0
        )
    ),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(recipe(refresh_factors_every=4), 3)),
    "MultiSteps": Case(lambda: optax.MultiSteps(recipe(refresh_factors_every=4), 2), strict=False),
}


@functools.cache
def trained(name: str) -> Record:
    """Trains once for all tests of a case."""
    return train(CASES[name])


each_case = parametrize(CASES)


@each_case
def test_loss_falls(name):
    check_loss_falls(trained(name), CASES[name].falls_to)


@each_case
def test_update_is_traced_once(name):
    assert trained(name).traces == 1


@each_case
def test_structure_is_stable(name):
    check_structure_is_stable(trained(name))


@each_case
def test_state_is_named_tuples_of_arrays(name):
    check_state_is_named_tuples_of_arrays(trained(name))


@each_case
def test_jit_equals_no_jit(name):
    check_jit_equals_no_jit(trained(name), (1, ADAPTS, UPDATES))


@each_case
def test_record_is_flat(name):
    state = trained(name).calls[-1][1][1]
    numbers = kfgn.diagnostics.record(state)
    assert all(isinstance(x, (bool, int, float)) for x in numbers.values())
    injected = getattr(state, "hyperparams", {})
    assert numbers | {n: pytest.approx(float(x)) for n, x in injected.items()} == numbers
    if "scale_by_curvature" in name or "kf" in name:
        assert numbers["count"] == UPDATES and numbers["loss"] > 0


def test_plain_calls_need_no_jit():
    params, batch = make_params(), make_batch()
    tx = recipe()
    actual = make_step(tx)(params, tx.init(params), batch)
    expected = jax.jit(make_step(tx))(params, tx.init(params), batch)
    assert_close(actual, expected, 1e-4)


def test_numpy_batches_and_parameters():
    as_numpy = jax.tree.map(np.asarray, (make_params(), make_batch()))
    params, (inputs, labels) = as_numpy
    # numpy's own defaults, 64 bits, mean jax's defaults.
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    batch = (inputs.astype(np.float64), labels.astype(np.int64))
    tx = kfgn.kfra(OBJECTIVE, params, batch)
    state = tx.init(params)
    (loss, grads), curvature = kfgn.value_grad_and_curvature(OBJECTIVE)(params, batch)
    updates, _ = tx.update(grads, state, params, curvature=curvature)
    (_, expected_state, expected_params, _), (expected, _) = trained("kfra").calls[0]
    assert loss == pytest.approx(trained("kfra").losses[0])
    assert_close(updates, expected, 1e-4)
    assert_equal(state, expected_state)
    assert_equal(params, expected_params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: recipe(average_decay=0.95),
        lambda: recipe(inverse="eigen"),
        lambda: optax.chain(
            kronecker(), kfgn.transforms.scale_by_quadratic_model(momentum=True), descend()
        ),
    ],
    ids=["average", "eigen", "parts"],
)
def test_donated_buffers(make):
    # Straight from init: no two arrays of a state may share a buffer, or one with params.
    tx, batch = make(), make_batch()
    step = make_step(tx)
    params, donated = make_params(), make_params()
    state, donated_state = tx.init(params), tx.init(donated)
    plain, donating = jax.jit(step), jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        params, state, _ = plain(params, state, batch)
        before = jax.tree.leaves((donated, donated_state))
        donated, donated_state, _ = donating(donated, donated_state, batch)
        assert all(leaf.is_deleted() for leaf in before)
    assert_equal((donated, donated_state), (params, state))


@pytest.mark.parametrize("method", ["kfra", "kflr", "kfac"])
def test_bfloat16(method):
    params = make_params(jnp.bfloat16)
    batches = [make_batch(jnp.bfloat16, seed=seed) for seed in range(3)]
    tx = getattr(kfgn, method)(OBJECTIVE, params, batches[0])
    step, state = jax.jit(make_step(tx, method)), tx.init(params)
    layout, losses = jax.tree.map(lambda a: (a.shape, a.dtype), state), []
    for k in range(UPDATES):
        key = jax.random.key(k) if method == "kfac" else None
        params, state, _ = step(params, state, batches[k % 3], key)
        losses.append(float(OBJECTIVE(params, batches[0])))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == layout
    factors = optax.tree_utils.tree_get(state, "factors")
    assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("make", [recipe, lambda: optax.chain(kronecker(), descend())])
def test_vmap_over_two_trainings(make):
    tx = make()
    step = make_step(tx)
    several = [(make_params(seed=seed), make_batch(seed=seed)) for seed in range(2)]
    params, batches = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    states = jax.vmap(tx.init)(params)
    both, one = jax.jit(jax.vmap(step)), jax.jit(step)
    alone = [(p, tx.init(p)) for p, _ in several]
    for _ in range(ADAPTS):
        params, states, _ = both(params, states, batches)
        alone = [one(p, s, b)[:2] for (p, s), (_, b) in zip(alone, several, strict=True)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    assert_close((params, states), expected, 1e-3)


def test_tree_get_reads_the_state():
    state = trained("clip").calls[-1][1][1]
    get = functools.partial(optax.tree_utils.tree_get, state)
    assert get("count") == UPDATES and get("skipped") == 0
    assert set(get("factors")) == {"hidden", "out"}
    for name in ("factor_damping", "step_damping", "step_size", "momentum", "reduction_ratio"):
        assert np.isfinite(get(name))


# The wrappers, beyond the contract: the numbers they pass on are the right ones.


def update_once(tx, params, grads, curvature):
    return jax.jit(tx.update)(grads, tx.init(params), params, curvature=curvature)


@pytest.fixture
def first():
    """Parameters, the gradient of a batch, and its curvature."""
    params = make_params()
    (_, grads), curvature = measure("kfra", params, make_batch())
    return params, grads, curvature


def test_masked_layers_pass_unchanged(first):
    params, grads, curvature = first
    whole, _ = update_once(kronecker(), *first)
    masked, _ = update_once(
        optax.masked(kronecker(), by_layer(hidden=False, out=True)), params, grads, curvature
    )
    assert_close(masked["out"], whole["out"], 1e-6)
    assert_equal(masked["hidden"], grads["hidden"])


@pytest.mark.loose_dtypes  # optax.adam
def test_partition_gives_each_part_its_own_optimizer(first):
    params, grads, curvature = first
    parts = {"second": recipe(momentum=False, factor_damping=1.0), "first": optax.adam(0.02)}
    updates, _ = update_once(optax.partition(parts, by_layer(hidden="second", out="first")), *first)
    adam, _ = update_once(
        optax.with_extra_args_support(optax.adam(0.02)),
        params["out"],
        grads["out"],
        curvature,
    )
    assert_close(updates["out"], adam, 1e-6)
    # The other part goes along its own block's direction, by a step of its own.
    direction, _ = update_once(kronecker(1.0 + L2), *first)
    ratios = jax.tree.map(lambda u, d: u / d, updates["hidden"], direction["hidden"])
    ratios = np.concatenate([np.ravel(r) for r in jax.tree.leaves(ratios)])
    assert ratios.max() < 0
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_injected_damping_is_used(first):
    expected, _ = update_once(kronecker(0.3), *first)
    for damping in (0.3, optax.linear_schedule(0.3, 1.0, 10)):
        tx = inject(kfgn.transforms.scale_by_kronecker)(BLOCKS, damping)
        updates, state = update_once(tx, *first)
        assert_close(updates, expected, 1e-5)
        assert state.hyperparams["damping"] == pytest.approx(0.3)
    state.hyperparams["damping"] = jnp.array(0.5)
    scheduled, state = jax.jit(tx.update)(first[1], state, first[0], curvature=first[2])
    assert state.hyperparams["damping"] == pytest.approx(0.37)
    second, _ = update_once(kronecker(0.37), *first)
    assert_close(scheduled, second, 1e-5)  # the same batch again leaves its factors


def test_apply_if_finite_sees_a_broken_gradient(first):
    params, grads, curvature = first
    tx = optax.apply_if_finite(recipe(), 3)
    broken = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = update_once(tx, params, broken, curvature)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.notfinite_count) == 1
    assert_equal(state.inner_state, tx.init(params).inner_state)


@pytest.mark.loose_dtypes  # optax.MultiSteps
def test_multi_steps_averages_gradients_and_keeps_the_last_curvature(first):
    params, grads, curvature = first
    (_, other), last = measure("kfra", params, make_batch(seed=1))
    tx = optax.MultiSteps(kronecker(), 2)
    update = jax.jit(tx.update)
    idle, state = update(grads, tx.init(params), params, curvature=curvature)
    assert_equal(idle, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(other, state, params, curvature=last)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, grads, other)
    expected, _ = update_once(kronecker(), params, mean, last)
    assert_close(updates, expected, 1e-5)
    assert int(state.gradient_step) == 1


@pytest.mark.parametrize("broken", [False, True])
def test_multi_steps_are_steps_of_the_whole_batch(broken, x64):
    """Micro-batches of unequal size, one of them perhaps not finite, and two updates."""
    params, (inputs, labels) = make_params(jnp.float64), make_batch(jnp.float64)
    parts = [slice(0, 3), slice(3, 4), slice(4, len(labels))]
    micro = [(inputs[part], labels[part]) for part in parts]
    tx = kfgn.transforms.multi_steps(kronecker(), BLOCKS, len(micro) + broken)
    update, measured = jax.jit(tx.update), jax.jit(lambda p, b: measure("kflr", p, b))
    state, alone, whole = tx.init(params), kronecker(), kronecker().init(params)
    for _ in range(2):
        if broken:
            (_, grads), curvature = measured(params, (jnp.nan * inputs[:2], labels[:2]))
            _, state = update(grads, state, params, curvature=curvature)
        for k, batch in enumerate(micro):
            (_, grads), curvature = measured(params, batch)
            step, state = update(grads, state, params, curvature=curvature)
            assert k == 2 or not any(jnp.any(leaf) for leaf in jax.tree.leaves(step))
        (_, grads), curvature = measured(params, (inputs, labels))
        expected, whole = alone.update(grads, whole, params, curvature=curvature)
        assert_close(step, expected, 1e-12)
        params = optax.apply_updates(params, step)
    assert_close(state.inner.factors, whole.factors, 1e-12)


def test_average_decay_averages_the_parameters():
    record = trained("average")
    visited = [optax.apply_updates(call[2], updates) for call, (updates, _) in record.calls]
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *visited)  # 1 - 1/t is below 0.95 so far
    average = optax.tree_utils.tree_get(record.calls[-1][1][1], "average")
    assert_close(average, mean, 1e-4)
