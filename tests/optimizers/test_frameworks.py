"""The optimizer in other libraries' training loops: flax, nnx, equinox, orbax."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import kfgn
from tests.tables.small import (
    CLASSES,
    HIDDEN,
    INPUTS,
    LOSS,
    OBJECTIVE,
    assert_equal,
    make_batch,
    make_params,
    make_step,
)

# The models compute in their own dtypes.
pytestmark = pytest.mark.loose_dtypes

UPDATES = 6


def plain_losses() -> list[float]:
    """The losses of the plain loop, which every framework must repeat."""
    params, batch = make_params(), make_batch()
    tx = kfgn.kfra(OBJECTIVE, params, batch)
    step, state, losses = jax.jit(make_step(tx)), tx.init(params), []
    for _ in range(UPDATES):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return plain_losses()


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="out")(nn.tanh(nn.Dense(HIDDEN, name="hidden")(x)))


def test_flax_train_state(expected):
    # apply_gradients has no way to hand on `curvature`, so update is called by hand.
    model, batch = Linen(), make_batch()
    objective = kfgn.Objective(
        lambda params, x: model.apply({"params": params}, x), LOSS, l2=OBJECTIVE.l2
    )
    params = make_params()
    curvature_fn = kfgn.value_grad_and_curvature(objective)
    train = TrainState.create(
        apply_fn=model.apply, params=params, tx=kfgn.kfra(objective, params, batch)
    )

    @jax.jit
    def step(train, batch):
        (loss, grads), curvature = curvature_fn(train.params, batch)
        updates, opt_state = train.tx.update(
            grads, train.opt_state, train.params, curvature=curvature
        )
        params = optax.apply_updates(train.params, updates)
        return train.replace(step=train.step + 1, params=params, opt_state=opt_state), loss

    losses = []
    for _ in range(UPDATES):
        train, loss = step(train, batch)
        losses.append(float(loss))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert int(train.step) == UPDATES

    # flax's own serialization, too.
    state_dict = serialization.to_state_dict(train.opt_state)
    fresh = train.tx.init(train.params)
    assert_equal(serialization.from_state_dict(fresh, state_dict), train.opt_state)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def test_nnx_optimizer(expected):
    model, batch = Nnx(nnx.Rngs(0)), make_batch()
    nnx.update(model, nnx.State(make_params()))
    graph, params = nnx.split(model, nnx.Param)
    objective = kfgn.Objective(lambda params, x: nnx.merge(graph, params)(x), LOSS, l2=OBJECTIVE.l2)
    curvature_fn = kfgn.value_grad_and_curvature(objective)
    optimizer = nnx.Optimizer(model, kfgn.kfra(objective, params, batch), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, batch):
        traces.append(1)
        (loss, grads), curvature = curvature_fn(nnx.state(model, nnx.Param), batch)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    losses = [float(step(model, optimizer, batch)) for _ in range(UPDATES)]
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(traces) == 1
    assert int(optax.tree_utils.tree_get(nnx.as_pure(optimizer.opt_state), "count")) == UPDATES


class Equinox(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self):
        key = jax.random.key(0)
        self.hidden = eqx.nn.Linear(INPUTS, HIDDEN, key=key)
        self.out = eqx.nn.Linear(HIDDEN, CLASSES, key=key)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def test_equinox_partition(expected):
    start, batch = make_params(), make_batch()
    model = eqx.tree_at(
        lambda m: (m.hidden.weight, m.hidden.bias, m.out.weight, m.out.bias),
        Equinox(),
        (start["hidden"]["kernel"].T, start["hidden"]["bias"],
         start["out"]["kernel"].T, start["out"]["bias"]),
    )  # fmt: skip
    params, static = eqx.partition(model, eqx.is_inexact_array)
    objective = kfgn.Objective(
        lambda params, x: jax.vmap(eqx.combine(params, static))(x), LOSS, l2=OBJECTIVE.l2
    )
    tx = kfgn.kfra(objective, params, batch)
    curvature_fn = kfgn.value_grad_and_curvature(objective)

    @jax.jit
    def step(params, state):
        (loss, grads), curvature = curvature_fn(params, batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return eqx.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(UPDATES):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("inverse", ["factored", "eigen"])
def test_orbax_round_trip_continues_alike(tmp_path, inverse):
    params, batch = make_params(), make_batch()
    tx = kfgn.kfra(OBJECTIVE, params, batch, inverse=inverse, average_decay=0.95)
    step, state = jax.jit(make_step(tx)), tx.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, batch)
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        fresh = {"params": make_params(), "state": tx.init(make_params())}
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: fresh))
    assert_equal(restored, saved)
    for _ in range(3):
        params, state, _ = step(params, state, batch)
    again = (restored["params"], restored["state"])
    for _ in range(3):
        *again, _ = step(*again, batch)
    assert_equal(tuple(again), (params, state))
