"""What the record of an update says, against the objective, the gradient and dense factors."""

from __future__ import annotations

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import kfgn
from tests.tables.small import L2, OBJECTIVE, make_batch, make_params, make_step

record = kfgn.diagnostics.record


def moved(tx, batch, updates=2):
    """Two parameters that follow one another, and the state after the update between them."""
    params = make_params(jnp.float64)
    step, state = jax.jit(make_step(tx)), tx.init(params)
    for _ in range(updates):
        before = params
        params, state, _ = step(params, state, batch)
    return before, params, state


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))


@pytest.mark.parametrize("inverse", ["factored", "eigen"])
def test_numbers_are_those_of_the_update(inverse, x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    rule = kfgn.transforms.LevenbergMarquardt(0.1, period=1)
    tx = kfgn.kfra(OBJECTIVE, params, batch, step_damping=rule, learning_rate=1.0, inverse=inverse)
    before, after, state = moved(tx, batch)
    found = record(state)
    # The numbers of a state are float32.
    value, gradient = jax.value_and_grad(OBJECTIVE)(before, batch)
    assert found["loss"] == pytest.approx(float(value), rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(norm(gradient), rel=1e-6)
    step = jax.tree.map(jnp.subtract, after, before)
    assert found["update_norm"] == pytest.approx(norm(step), rel=1e-6)
    assert found["actual_change"] == pytest.approx(float(OBJECTIVE(after, batch) - value), rel=1e-5)
    ratio = found["actual_change"] / found["predicted_change"]
    assert found["reduction_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert (found["count"], found["skipped"], found["refused"]) == (2, 0, 0)
    assert (found["refresh_inverse_every"], found["step_damping_period"]) == (5, 1)
    # The dense factors' extremes.
    tops, conditions = [], []
    for q, g in optax.tree_utils.tree_get(state, "factors").values():
        root = np.sqrt(found["factor_damping"] + L2)
        balance = np.sqrt(np.trace(q) * len(g) / (np.trace(g) * len(q)))
        tops.append(np.linalg.norm(q, 2) * np.linalg.norm(g, 2))
        if inverse == "eigen":
            conditions.append(np.linalg.cond(np.kron(q, g) + root**2 * np.eye(len(q) * len(g))))
        else:
            damped = q + balance * root * np.eye(len(q)), g + root / balance * np.eye(len(g))
            conditions.append(np.linalg.cond(damped[0]) * np.linalg.cond(damped[1]))
    if inverse == "eigen":
        assert found["largest_eigenvalue"] == pytest.approx(max(tops), rel=1e-6)
        assert found["condition"] == pytest.approx(max(conditions), rel=1e-6)
    else:  # bounds, and no bad ones
        assert max(tops) <= found["largest_eigenvalue"] < 2 * max(tops)
        assert max(conditions) <= found["condition"] < 4 * max(conditions)


def test_a_skipped_update_changes_counts_alone():
    params, batch = make_params(), make_batch()
    tx = kfgn.kfra(OBJECTIVE, params, batch)
    step, state = jax.jit(make_step(tx)), tx.init(params)
    params, state, _ = step(params, state, batch)
    before = record(state)
    _, state, _ = step(params, state, (batch[0] * jnp.nan, batch[1]))
    assert record(state) == before | {"skipped": 1, "skipped_in_a_row": 1}


def test_a_csv_a_jitted_function_and_several_trainings_take_it():
    params, batch = make_params(), make_batch()
    tx = kfgn.kfra(OBJECTIVE, params, batch)
    state = tx.init(params)
    file = io.StringIO()
    writer = csv.DictWriter(file, record(state))
    writer.writerow(record(state))
    assert all(float(cell) >= 0 for cell in file.getvalue().strip().split(","))
    assert jax.jit(record)(state) == record(state)
    many = record(jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), params)))
    assert {np.shape(x) for x in many.values()} == {(2,)}


def test_two_optimizers_in_one_state_keep_their_names_apart():
    params, batch = make_params(), make_batch()
    tx = kfgn.kfra(OBJECTIVE, params, batch)
    label = {n: dict.fromkeys(layer, n) for n, layer in params.items()}
    train = TrainState.create(
        apply_fn=None, params=params, tx=optax.partition({"hidden": tx, "out": tx}, label)
    )
    assert record(train) == record(train.opt_state)
    names = [n for n in record(train) if n.endswith("step_size")]
    assert len(names) == 2 and all(part in name for part, name in zip(label, names, strict=True))


def test_several_micro_batches_have_the_record_of_their_update(x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
    alone = kfgn.kfra(OBJECTIVE, params, batch)
    *_, state = moved(kfgn.transforms.multi_steps(alone, blocks, 2), batch, updates=4)
    numbers = record(state)
    assert numbers["count"] == 2 and numbers["loss"] > 0 < numbers["examples"]


def test_a_state_of_others_is_refused():
    with pytest.raises(kfgn.errors.OptionError, match="no state of one of kfgn's"):
        record(optax.sgd(0.1, momentum=0.9).init(jnp.ones(2)))
