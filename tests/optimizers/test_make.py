"""One call makes an optimizer and its curvature; the method follows predicted costs."""

import io

import jax
import jax.numpy as jnp
import optax
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params, shapes

SQUARED = kfgn.losses.half_squared_error


def wide(outputs):
    """A dense net on shapes alone, with so many outputs."""
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, outputs))}
    objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], SQUARED)
    return objective, shapes(params), shapes((jnp.zeros((4096, 64)), jnp.zeros((4096, outputs))))


def attention():
    """Values mixed over positions, where a mean matrix over all entries is dear."""

    def model(p, x):
        h = x @ p["in"]
        return jnp.mean(jax.nn.softmax(h @ h.mT) @ h, axis=1) @ p["out"]

    params = {"in": jnp.zeros((8, 8)), "out": jnp.zeros((8, 8))}
    batch = jnp.zeros((32, 24, 8)), jnp.zeros((32, 8))
    return kfgn.Objective(model, SQUARED), shapes(params), shapes(batch)


def chosen(made, params, batch):
    """The method, found without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, curvature = jax.eval_shape(
        lambda p, b, k: made.curvature_fn(p, b, key=k), params, batch, key
    )
    return curvature.settings.method


def test_auto_takes_the_most_exact_method_that_is_cheap():
    one, many = wide(1), wide(512)
    assert chosen(kfgn.make(*one), *one[1:]) == "kflr"
    assert chosen(kfgn.make(*many), *many[1:]) in ("kfra", "kfac")
    tokens = attention()
    assert chosen(kfgn.make(*tokens), *tokens[1:]) != "kfra"


def test_a_dear_method_is_said_with_the_cheaper_one():
    objective, params, batch = attention()
    with pytest.warns(kfgn.errors.CostWarning, match=r"'kfra' .* method 'kfac' is predicted"):
        kfgn.make(objective, params, batch, method="kfra")
    found = kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.update
    assert found["kfra"] > 10 > found["kfac"]


def test_a_matrix_too_large_for_kfra_is_refused_at_creation():
    objective = kfgn.Objective(lambda p, x: jnp.mean(x @ p["w"], axis=1), SQUARED)
    params, batch = (
        shapes({"w": jnp.zeros((4, 64))}),
        shapes((jnp.zeros((2, 1024, 4)), jnp.zeros((2, 64)))),
    )
    with pytest.raises(kfgn.errors.ModelError, match=r'65,536 x 65,536 .* spatial="homogeneous"'):
        kfgn.make(objective, params, batch, method="kfra")
    assert chosen(kfgn.make(objective, params, batch), params, batch) == "kfac"


def test_a_made_pair_trains_and_takes_every_option_once():
    params, batch = make_params(), make_batch()
    optimizer, curvature_fn = kfgn.make(
        OBJECTIVE, params, batch, model_examples=8, unassigned="gradient", learning_rate=0.8
    )

    @jax.jit
    def step(params, state, key):
        (value, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for k in range(8):
        params, state, value = step(params, state, jax.random.key(k))
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    with pytest.raises(kfgn.errors.OptionError, match=r"unknown option\(s\) 'dampng'"):
        kfgn.make(OBJECTIVE, params, batch, dampng=1.0)
