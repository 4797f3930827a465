"""A user hears of updates that are skipped one after another, and of nothing else."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params, make_step

GOOD = make_batch()
BAD = (GOOD[0] * jnp.nan, GOOD[1])
HEARD = kfgn.errors.SkippedUpdatesWarning


def said(step, params, state, batches) -> int:
    """How often a loop warns of skipped updates."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for batch in batches:
            params, state, _ = step(params, state, batch)
        jax.tree.map(lambda x: x, state)  # whoever looks at a state hears at once
    return sum(issubclass(w.category, HEARD) for w in found)


def prepared(**options):
    params = make_params()
    tx = kfgn.kfra(OBJECTIVE, params, GOOD, **options)
    return make_step(tx), params, tx.init(params)


@pytest.fixture(scope="module")
def third():
    """A compiled step that warns after three."""
    step, *_ = prepared(warn_after_skipped=3)
    return jax.jit(step)


@pytest.mark.parametrize(
    "batches, times",
    [([BAD] * 3, 1), ([BAD] * 2, 0), ([BAD, BAD, GOOD] * 3, 0), ([GOOD, BAD, BAD, BAD, GOOD], 1)],
    ids=["three", "two", "never three in a row", "three, then a good one"],
)
def test_too_many_in_a_row_are_said(third, batches, times):
    _, params, state = prepared(warn_after_skipped=3)
    assert min(said(third, params, state, batches), 1) == times


def test_none_is_silent():
    step, params, state = prepared(warn_after_skipped=None)
    assert said(jax.jit(step), params, state, [BAD] * 24) == 0


def test_states_that_are_compared_say_nothing():
    _, _, state = prepared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(11):
            assert jax.tree.all(jax.tree.map(jnp.array_equal, state, state))
            jax.tree.map(lambda x: object(), state)  # as checkpoints do with their options


def test_ten_by_default_with_donated_buffers():
    step, params, state = prepared()
    donating = jax.jit(step, donate_argnums=(0, 1))
    assert said(donating, params, state, [BAD] * 24) > 0
    # A wrong batch that is said as an error stops the loop.
    params, state = prepared()[1:]
    with warnings.catch_warnings(), pytest.raises(HEARD, match=r"not finite.*DEBUG_NANS"):
        warnings.simplefilter("error", HEARD)
        for _ in range(24):
            params, state, _ = donating(params, state, BAD)


def test_a_loop_inside_the_program_is_heard_at_its_end():
    step, params, state = prepared(warn_after_skipped=3)

    def loop(params, state, batch):
        def turn(carry, _):
            params, state, loss = step(*carry, batch)
            return (params, state), loss

        (params, state), losses = jax.lax.scan(turn, (params, state), length=3)
        return params, state, losses

    assert said(jax.jit(loop), params, state, [BAD]) > 0


@pytest.mark.loose_dtypes
def test_the_state_of_an_nnx_optimizer_is_heard():
    class Model(nnx.Module):
        def __init__(self):
            self.out = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.out(x)

    model = Model()
    graph, params = nnx.split(model, nnx.Param)
    objective = kfgn.Objective(lambda p, x: nnx.merge(graph, p)(x), OBJECTIVE.loss)
    curvature_fn = kfgn.value_grad_and_curvature(objective)
    tx = kfgn.kfra(objective, params, GOOD, warn_after_skipped=3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        (loss, grads), curvature = curvature_fn(nnx.state(model, nnx.Param), batch)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    with pytest.warns(HEARD):
        for _ in range(24):
            step(model, optimizer, BAD)
    assert kfgn.diagnostics.record(optimizer)["skipped_in_a_row"] == 24


def test_parts_and_solvers_are_heard():
    params = make_params()
    blocks = kfgn.layers.find_blocks(OBJECTIVE, params, GOOD)
    tx = optax.chain(
        kfgn.transforms.scale_by_kronecker(blocks, 0.1, warn_after_skipped=3), optax.scale(-0.1)
    )
    assert said(jax.jit(make_step(tx)), params, tx.init(params), [BAD] * 4) > 0
    with pytest.raises(kfgn.errors.OptionError, match="warn_after_skipped"):
        kfgn.transforms.scale_by_kronecker(blocks, 0.1, warn_after_skipped=0)
