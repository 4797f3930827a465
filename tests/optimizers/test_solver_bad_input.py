"""Solvers where a matrix is indefinite, an objective is not finite, or batches run dry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.tree_util import Partial

import kfgn
from tests.tables.small import OBJECTIVE, assert_equal, make_batch, make_params

# At w = 0.9 all steps to a minimum of the quadratic model lead to w < 0, where log(w) is NaN.
LOGARITHM = kfgn.Objective(lambda p, x: x * jnp.log(p["w"]), kfgn.losses.half_squared_error)
START = {"w": jnp.full(1, 0.9)}
BATCH = (jnp.ones((4, 1)), jnp.full((4, 1), -5.0))


def negated(product: Partial, u: jax.Array, v: jax.Array) -> jax.Array:
    return -product(u, v)


negated.axis_name = None  # of devices, as a curvature's own product has


def test_negative_curvature_is_in_the_state_and_the_direction_still_ascends():
    params, batch = make_params(), make_batch()
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE, "kflr"))(params, batch)
    indefinite = curvature._replace(output_product=Partial(negated, curvature.output_product))
    tx = kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, damping=0.02, tolerance=1e-6)
    found, state = jax.jit(tx.update)(grads, tx.init(params), params, curvature=indefinite)
    assert bool(state.negative_curvature) and int(state.skipped) == 0
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(grads), strict=True)
    assert sum(float(jnp.vdot(d, g)) for d, g in pairs) > 0
    assert all(bool(jnp.all(jnp.isfinite(d))) for d in jax.tree.leaves(found))
    _, state = jax.jit(tx.update)(grads, state, params, curvature=curvature)
    assert not bool(state.negative_curvature)  # of the last solution


def update_of(tx: Any, search: bool = False) -> Any:
    """`(state, params) -> (updates, state)` for the logarithm, compiled."""
    curvature_fn = kfgn.value_grad_and_curvature(LOGARITHM, "kflr", unassigned="gradient")

    @jax.jit
    def update(state, params, batch):
        (value, grads), curvature = curvature_fn(params, batch)
        more = {"value": value, "grad": grads, "value_fn": LOGARITHM} if search else {}
        return tx.update(grads, state, params, curvature=curvature, batch=batch, **more)

    return lambda state, params=START: update(state, params, BATCH)


def test_a_step_to_where_the_objective_is_not_finite_is_refused():
    damping = kfgn.transforms.LevenbergMarquardt(0.1, 1e-6, 1e6, period=1, decay=0.5)
    tx = kfgn.transforms.scale_by_conjugate_gradient(LOGARITHM, damping=damping, warm_start=0.5)
    update, state = update_of(tx), tx.init(START)
    updates, after = update(state)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, START))
    assert float(after.damping) == pytest.approx(0.2) and int(after.skipped) == 1
    same = after._replace(damping=state.damping, skipped=state.skipped, streak=state.streak)
    assert_equal(same, state)
    for _ in range(8):  # λ makes the step short enough
        if int(after.count) == 0:
            updates, after = update(after)
    assert int(after.count) == 1
    moved = jax.tree.map(jnp.subtract, START, updates)
    assert LOGARITHM(moved, BATCH) < LOGARITHM(START, BATCH)


def searched(direction: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    search = kfgn.transforms.without_curvature(optax.scale_by_backtracking_linesearch(steps))
    return optax.chain(direction, optax.scale(-1.0), search)


DIRECTIONS = {
    "newton": lambda: kfgn.transforms.scale_by_newton(LOGARITHM),
    "conjugate gradients": lambda: kfgn.transforms.scale_by_conjugate_gradient(
        LOGARITHM, damping=0.01
    ),
}


@pytest.mark.loose_dtypes  # optax's line searches
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_line_search_turns_back_from_where_the_objective_is_not_finite(name):
    tx = optax.chain(DIRECTIONS[name](), optax.scale(-1.0))
    whole, _ = update_of(tx)(tx.init(START))
    assert not jnp.isfinite(LOGARITHM(optax.apply_updates(START, whole), BATCH))
    tx = searched(DIRECTIONS[name](), 20)
    updates, _ = update_of(tx, search=True)(tx.init(START))
    assert LOGARITHM(optax.apply_updates(START, updates), BATCH) < LOGARITHM(START, BATCH)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", DIRECTIONS)
def test_from_where_the_objective_is_not_finite_no_step_is_made(name):
    tx = searched(DIRECTIONS[name](), 20)
    update = update_of(tx, search=True)
    _, state = update(tx.init(START))
    params = {"w": -START["w"]}
    updates, after = update(state, params)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    same = after[0]._replace(skipped=state[0].skipped, streak=state[0].streak)
    assert_equal(same, state[0])
    assert int(after[0].skipped) == 1
