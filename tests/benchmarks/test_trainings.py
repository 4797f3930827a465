"""The small trainings: some are made, and two are trained for some steps."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import kfgn
from benchmarks import BenchmarkError
from benchmarks.__main__ import main
from benchmarks.experiments import trainings

pytestmark = pytest.mark.loose_dtypes


@pytest.mark.parametrize("name", ["batch-norm", "variational", "contrastive"])
def test_tasks_are_made(name):
    """With nothing set, for their batches, on shapes."""
    task = trainings.TASKS[name](0)
    batch = jax.eval_shape(task.draw, jax.random.key(0), task.params)
    optimizer, curvature_fn = kfgn.make(task.objective, task.params, batch)
    key = jax.random.key(0)

    def step(params, state, batch):
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        return optimizer.update(grads, state, params, curvature=curvature)

    state = jax.eval_shape(optimizer.init, task.params)
    updates, after = jax.eval_shape(step, task.params, state, batch)
    assert jax.tree.structure(updates) == jax.tree.structure(task.params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_command(tmp_path):
    arguments = ["trainings", "--only", "rewards,sets", "--steps", "12", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["measured"]
    assert set(found) == {"rewards", "sets"}
    for own in found.values():
        assert own["steps"] == 12 <= own["adam_steps"] and own["skipped"] == 0
        assert own["reached"] < own["start"] and own["adam_same_seconds"] < own["start"]
        assert own["step_seconds"] > 0 < own["compile_seconds"]
    assert "rewards" in (tmp_path / "table.txt").read_text()
    with pytest.raises(BenchmarkError, match="no task 'reward'; did you mean 'rewards'"):
        trainings.main(["--only", "reward"])
