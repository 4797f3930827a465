"""Averaging the curvature of micro-batches gives that of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn


def _problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": {"kernel": jax.random.normal(keys[0], (5, 4)), "bias": jnp.zeros(4)},
        "b": {"kernel": jax.random.normal(keys[1], (4, 3)), "bias": jnp.zeros(3)},
    }

    def model(params, x):
        h = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
        return h @ params["b"]["kernel"] + params["b"]["bias"]

    x = jax.random.normal(keys[2], (8, 5))
    y = jax.nn.softmax(jax.random.normal(keys[3], (8, 3)))
    return kfgn.Objective(model, kfgn.losses.softmax_cross_entropy, l2=1e-2), params, x, y


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["kflr", "empirical"])
def test_average_of_halves_is_the_whole(method):
    objective, params, x, y = _problem()
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(objective, method))
    whole = curvature_fn(params, (x, y))[1]
    halves = [curvature_fn(params, (x[i : i + 4], y[i : i + 4]))[1] for i in (0, 4)]
    mean = jax.jit(kfgn.average_curvature)(halves)
    direction = jax.tree.map(jnp.cos, whole.gradient)

    def summary(curvature):
        outputs = curvature.linearized(direction)
        form = curvature.output_product(outputs, outputs)
        return (*curvature[:3], form, outputs, curvature.displaced(direction))

    # Sums of eight terms in another order: a few roundoffs.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
        summary(mean),
        summary(whole),
    )


def test_averaged_curvature_drives_an_update():
    objective, params, x, y = _problem()
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfra")
    optimizer = kfgn.kfra(objective, params, (x[:4], y[:4]))
    state = optimizer.init(params)
    before = objective(params, (x, y))
    for _ in range(5):
        parts = [curvature_fn(params, (x[i : i + 4], y[i : i + 4])) for i in (0, 4)]
        grads = jax.tree.map(lambda a, b: (a + b) / 2, *[grads for (_, grads), _ in parts])
        curvature = kfgn.average_curvature([curvature for _, curvature in parts])
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        params = jax.tree.map(jnp.add, params, updates)
    assert objective(params, (x, y)) < before


@pytest.mark.parametrize("wrong", [[], [1.0]])
def test_nothing_to_average(wrong):
    with pytest.raises(kfgn.errors.OptionError, match=r"expected one kfgn\.Curvature or more"):
        kfgn.average_curvature(wrong)
