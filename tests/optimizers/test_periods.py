"""Periods of factors and inverses: when they are due, and how they follow costs."""

from __future__ import annotations

import io

import jax.numpy as jnp
import optax
import pytest

import kfgn
from kfgn.diagnostics.costs import LONGEST, SHARE, period, update_cost
from kfgn.optimizers.periods import inversion_due, observation_due
from tests.tables.small import OBJECTIVE, make_batch, make_params, shapes


def due(rule, every, until=130):
    return [k for k in range(until) if bool(rule(jnp.int32(k), every))]


def test_when_factors_and_inverses_are_due():
    assert due(observation_due, 1) == due(inversion_due, 1) == list(range(130))
    assert due(observation_due, 5) == [*range(10), *range(10, 130, 5)]
    assert due(inversion_due, 5) == [*range(5), *range(5, 130, 5)]
    assert due(inversion_due, 3, 10) == [0, 1, 2, 3, 6, 9]
    # A long first period is filled at powers of two, as the average moves most there.
    assert due(observation_due, 50) == [*range(10), 16, 32, 50, 100]
    assert due(inversion_due, jnp.int32(50)) == [*range(5), 8, 16, 32, 50, 100]


@pytest.mark.parametrize("factors", [1, 7, 300])
@pytest.mark.parametrize("inversion", [0, 3, 40, 2000])
def test_a_period_is_the_least_within_the_share(factors, inversion):
    gradient = 20
    found = period(factors, inversion, gradient)
    nothing = update_cost(0, 0, 6, gradient, 8, found)
    assert nothing == pytest.approx(1 + 1 / 15 + 14 / 20)
    added = [
        update_cost(factors, inversion, 6, gradient, 8, n) - nothing
        for n in (found, found - 1 or 1)
    ]
    assert added[0] <= SHARE + 1e-12 or found == LONGEST
    assert found == 1 or added[1] > SHARE


def periods(optimizer, params):
    state = optimizer.init(params)
    return [
        int(optax.tree_utils.tree_get(state, name))
        for name in ("refresh_factors_every", "refresh_inverse_every")
    ]


@pytest.mark.parametrize("method", ["kfra", "kflr", "kfac"])
def test_auto_is_what_inspect_shows(method):
    params, batch = make_params(), make_batch(count=64)
    totals = kfgn.inspect(OBJECTIVE, params, batch, file=io.StringIO()).totals
    auto = {"refresh_factors_every": "auto", "refresh_inverse_every": "auto"}
    make = getattr(kfgn, method)
    for example in ((params, batch), shapes((params, batch))):
        found = periods(make(OBJECTIVE, *example, **auto), params)
        assert found == [totals.periods[method]] * 2
    one = periods(make(OBJECTIVE, params, batch, refresh_factors_every="auto"), params)
    assert one == [totals.periods[method], 5]
    made = kfgn.make(OBJECTIVE, params, batch, method=method, **auto)
    assert periods(made.optimizer, params) == found


def test_wide_layers_and_small_batches_have_longer_periods():
    def totals(width, count):
        params = shapes({"a": jnp.zeros((784, width)), "b": jnp.zeros((width, 10))})
        objective = kfgn.Objective(
            lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], kfgn.losses.half_squared_error
        )
        batch = shapes((jnp.zeros((count, 784)), jnp.zeros((count, 10))))
        return kfgn.inspect(objective, params, batch, file=io.StringIO()).totals.periods["kfac"]

    found = [totals(500, 1000), totals(2000, 1000), totals(2000, 125), totals(500, 125)]
    assert found[0] < found[1] < found[2] and found[0] < found[3] <= found[2] <= LONGEST


def test_auto_needs_the_alias():
    blocks = kfgn.layers.find_blocks(OBJECTIVE, make_params(), make_batch())
    for make in (kfgn.transforms.scale_by_curvature, kfgn.transforms.scale_by_kronecker):
        with pytest.raises(kfgn.errors.OptionError, match=r"totals\.periods"):
            make(blocks, refresh_inverse_every="auto")
    with pytest.raises(kfgn.errors.OptionError, match="whole number of at least 1, found 'often'"):
        kfgn.kfra(OBJECTIVE, make_params(), make_batch(), refresh_factors_every="often")
