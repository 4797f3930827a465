"""A model is read once for an optimizer and its compiled step, and anew wherever it may differ."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.model.graph.build_graph import build_graph
from kfgn.model.program import primitives

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
SHAPES = jax.eval_shape(lambda: PARAMS)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
BATCH = INPUTS, jnp.ones((4, 2))


class Counting:
    """An affine model that counts its calls, and has a factor that Python may change."""

    def __init__(self) -> None:
        self.calls, self.factor = 0, 1.0

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        self.calls += 1
        return self.factor * x @ params["w"] + params["b"]


@pytest.fixture
def model() -> Counting:
    return Counting()


@pytest.fixture
def objective(model: Counting) -> kfgn.Objective:
    return kfgn.Objective(model, kfgn.losses.half_squared_error)


def reading_calls(model: Counting, objective: kfgn.Objective, *arguments: Any) -> int:
    """How often the model is called to read it."""
    before = model.calls
    build_graph(objective, *arguments)
    return model.calls - before


def test_an_optimizer_and_its_compiled_step_read_once(model, objective):
    """Beyond the reading, a step calls the model only for values at displaced parameters."""
    optimizer = kfgn.kfra(objective, PARAMS, BATCH)
    curvature_fn, read = kfgn.value_grad_and_curvature(objective, "kfra"), model.calls
    (_, grads), curvature = jax.jit(curvature_fn)(PARAMS, BATCH)
    assert model.calls == read > 0
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(grads, state, PARAMS, curvature=curvature)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_shapes_are_read_once(model, objective):
    assert reading_calls(model, objective, SHAPES, INPUTS) > 0
    assert reading_calls(model, objective, SHAPES, INPUTS) == 0
    # Of another batch size, one example is the same.
    assert reading_calls(model, objective, SHAPES, INPUTS[:2]) == 0
    assert build_graph(objective, SHAPES, INPUTS) is build_graph(objective, SHAPES, INPUTS)


def test_values_are_read_anew(model, objective):
    """What changed in Python is seen, also by what is traced afterwards."""
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfra")
    (before, _), _ = curvature_fn(PARAMS, BATCH)
    model.factor = 2.0
    (after, _), curvature = curvature_fn(PARAMS, BATCH)
    expected = np.mean(np.sum(np.square(2 * INPUTS @ PARAMS["w"] - 1), axis=1)) / 2
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    assert abs(after - before) > 0.1
    (traced, _), _ = jax.jit(curvature_fn)(PARAMS, BATCH)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    np.testing.assert_allclose(curvature.value, expected, rtol=1e-6)


def test_readings_do_not_mix(model, objective, monkeypatch):
    """Of other shapes, dtypes, containers, objectives, registrations and settings."""
    other = kfgn.Objective(model, kfgn.losses.half_squared_error)
    half = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), SHAPES)
    wide = {**SHAPES, "w": jax.ShapeDtypeStruct((5, 2), jnp.float32)}
    build_graph(objective, SHAPES, INPUTS)
    for arguments in (
        (other, SHAPES, INPUTS),
        (objective, half, INPUTS.astype(jnp.bfloat16)),
        (objective, wide, jnp.ones((4, 5))),
        (objective, SHAPES, INPUTS, True),
    ):
        assert reading_calls(model, *arguments) > 0
    monkeypatch.setitem(primitives.REGISTERED, "mine", primitives.Primitive())
    assert reading_calls(model, objective, SHAPES, INPUTS) > 0
    with jax.default_matmul_precision("float32"):
        assert reading_calls(model, objective, SHAPES, INPUTS) > 0


def test_no_tracer_is_kept():
    """A model that closes over what is being traced is read for that trace only."""
    scale = {"value": jnp.ones(())}
    objective = kfgn.Objective(
        lambda p, x: scale["value"] * x @ p["w"], kfgn.losses.half_squared_error
    )
    gradient = kfgn.value_grad_and_curvature(objective, "kfra")

    def value(factor, params):
        scale["value"] = factor
        found = gradient(params, BATCH)[0][0]
        scale["value"] = None
        return found

    params = {"w": PARAMS["w"]}
    for factor in (2.0, 3.0):  # traced twice, as a lambda of its own each time
        found = jax.jit(lambda f, p: value(f, p))(factor, params)
        outputs = factor * INPUTS @ PARAMS["w"]
        expected = np.mean(np.sum(np.square(outputs - 1), axis=1)) / 2
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_forgotten_objective_is_collected(model):
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    build_graph(objective, SHAPES, INPUTS)
    gone = weakref.ref(objective)
    del objective
    gc.collect()
    assert gone() is None


def test_a_kept_reading_has_the_same_factors(objective):
    """Traced twice from one reading: nothing of the first trace is left in it."""
    first, second = (
        jax.jit(kfgn.value_grad_and_curvature(objective, "kfra"))(PARAMS, BATCH) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first[1].factors, second[1].factors)
