"""Q of kernels at several positions, from as many examples as it needs; by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn

pytestmark = pytest.mark.usefixtures("x64")

COUNT = 257  # not a multiple of the strides


def model(params, x):
    """A product at eight positions, a convolution of their values, and a layer without any."""
    h = jnp.tanh(x @ params["each"]["w"] + params["each"]["b"])
    h = jax.lax.conv_general_dilated(
        h, params["conv"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.mean(jnp.tanh(h), axis=1) @ params["out"]


def problem():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"each": {"w": (3, 4), "b": (4,)}, "conv": (2, 4, 5), "out": (5, 2)}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.unflatten(tree, [*map(jax.random.normal, keys, leaves)])
    x = jax.random.normal(keys[4], (COUNT, 8, 3))
    return params, (x, jnp.ones((COUNT, 2)))


def factors(method, rows, weights=None, **options):
    params, batch = problem()
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    function = kfgn.value_grad_and_curvature(objective, method, activation_rows=rows, **options)
    key = {"key": jax.random.key(1)} if method == "kfac" else {}
    batch = batch if weights is None else (*batch, weights)
    return jax.jit(lambda p: function(p, batch, **key)[1].factors)(params)


def moment(rows, weights=1.0):
    """`E[sum_t a_t a_t']`, of weighted examples."""
    weights = jnp.broadcast_to(weights, len(rows))
    return jnp.einsum("n,nti,ntj->ij", weights, rows, rows) / jnp.sum(weights)


def inputs_and_patches():
    """What the first two kernels are applied to, at eight and seven positions."""
    params, (x, _) = problem()
    h = jnp.tanh(x @ params["each"]["w"] + params["each"]["b"])
    ones = jnp.ones((*x.shape[:2], 1))
    patches = jnp.stack([h[:, :-1], h[:, 1:]], axis=3)  # channels first, then taps
    return jnp.concatenate([x, ones], 2), patches.reshape(*patches.shape[:2], -1)


def close(found, expected):
    """Sums of up to 2,000 products in another order."""
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["kfra", "kflr", "kfac", "empirical"])
@pytest.mark.parametrize("rows", [4, 140])
def test_q_is_that_of_examples_spread_over_the_batch(method, rows):
    """Of 4 and 8 rows: 140 x 4 / 8 = 70 examples; 140 x 8 / 7 = 160, more than half: all."""
    found, whole = factors(method, rows), factors(method, None)
    inputs, patches = inputs_and_patches()
    few = {4: (inputs[:256:4], patches[:256:4]), 140: (inputs[:210:3], patches)}[rows]
    for name, chosen in zip(("each", "conv"), few, strict=True):
        close(found[name].activation, moment(chosen))
        assert np.array_equal(found[name].pre_activation, whole[name].pre_activation)
    for a, b in zip(found["out"], whole["out"], strict=True):
        assert np.array_equal(a, b)


def test_weights_choose_among_examples_that_count():
    every_other = np.arange(COUNT) % 2 == 0
    weights = np.where(every_other, 1.0 + np.arange(COUNT) % 3, 0.0)
    found = factors("kflr", 4, jnp.asarray(weights))
    chosen = np.flatnonzero(every_other)[:128:2]  # of 129
    close(found["each"].activation, moment(inputs_and_patches()[0][chosen], weights[chosen]))


def test_sums_of_positions_take_all():
    found, whole = (factors("kflr", rows, sharing="reduce") for rows in (4, None))
    same = jax.tree.map(np.array_equal, found, whole)
    assert all(jax.tree.leaves(same))


def test_only_make_takes_few_by_itself():
    params, batch = problem()
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    for options, rows in ({}, 4), ({"activation_rows": None}, None):
        made = kfgn.make(objective, params, batch, method="kflr", **options)
        assert made.curvature_fn(params, batch)[1].settings.activation_rows == rows
    _, curvature = kfgn.value_grad_and_curvature(objective)(params, batch)
    assert curvature.settings.activation_rows is None


def test_a_wrong_number_is_refused():
    with pytest.raises(kfgn.errors.OptionError, match="activation_rows must be a whole number"):
        factors("kflr", 0)
