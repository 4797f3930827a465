"""Low precision: factors in float32, their products as asked, overflow that is no fault."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.optimizers.state import all_finite
from tests.tables.small import OBJECTIVE, assert_equal, make_batch, make_params, make_step

get = optax.tree_utils.tree_get


@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_products_of_the_factors_are_as_precise_as_asked(method, precision):
    """Every product that makes a factor, and none of another precision but the model's own."""
    params, batch = make_params(), make_batch()
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE, method, precision=precision)
    program = jax.make_jaxpr(lambda p, b: curvature_fn(p, b)[1].factors)(params, batch)
    found = set(re.findall(r"precision=\(?(Precision\.\w+|None|\w+)", str(program)))
    found = {name.removeprefix("Precision.").lower() for name in found}
    assert found - {"none"} == {precision}


def test_unknown_precision():
    with pytest.raises(kfgn.errors.OptionError, match=r"precision must be one of default, high"):
        kfgn.value_grad_and_curvature(OBJECTIVE, precision="tf32")


def test_sums_leave_no_range_that_entries_keep():
    """As gradients times a loss scale have them."""
    large = jnp.full((4, 64), 6e4, jnp.float16)
    assert all_finite({"a": large, "b": jnp.ones(3, jnp.float16)})
    assert not all_finite({"a": large.at[1, 2].set(jnp.inf)})
    with jax.enable_x64(True):
        assert all_finite((jnp.full((4, 4), 1e200), jnp.ones(3, jnp.float32)))


def test_float16_overflow_is_skipped_and_changes_no_damping():
    """A batch beyond float16's range, among those of a training with float16 parameters."""
    params = make_params(jnp.float16)
    batches = [make_batch(jnp.float16, seed=seed) for seed in range(3)]
    optimizer = kfgn.kfra(OBJECTIVE, params, batches[0])
    step, state = jax.jit(make_step(optimizer)), optimizer.init(params)
    first = float(OBJECTIVE(params, batches[0]))
    for k in range(12):
        inputs, labels = batches[k % 3]
        if k == 6:  # a last layer whose products are out of range
            big = jax.tree.map(lambda w: w * 6e4, params["out"])
            still, after, _ = step(params | {"out": big}, state, (inputs, labels))
            assert int(get(after, "skipped")) == 1
            assert_equal(still, params | {"out": big})
            for name in ("step_damping", "factor_damping", "count", "factors", "inverses"):
                assert_equal(get(after, name), get(state, name))
            state = after
        params, state, _ = step(params, state, (inputs, labels))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float16)}
    assert {x.dtype for x in jax.tree.leaves(get(state, "factors"))} == {np.dtype(np.float32)}
    assert int(get(state, "skipped")) == 1
    assert float(OBJECTIVE(params, batches[0])) < 0.9 * first
