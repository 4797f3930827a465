"""Averaging the curvature of micro-batches gives that of the whole batch."""

from __future__ import annotations

import itertools

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
@pytest.mark.parametrize("ends", [(0, 4, 8), (0, 3, 4, 8)], ids=["halves", "unequal"])
def test_average_of_parts_is_the_whole(method, ends):
    """Also where one part is itself an average."""
    objective, params, x, y = _problem()
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(objective, method))
    whole = curvature_fn(params, (x, y))[1]
    parts = [curvature_fn(params, (x[i:j], y[i:j]))[1] for i, j in itertools.pairwise(ends)]
    average = jax.jit(kfgn.average_curvature)
    mean = average(parts if len(parts) == 2 else [average(parts[:2]), parts[2]])
    assert mean.examples == whole.examples == 8
    direction = jax.tree.map(jnp.cos, whole.gradient)

    @jax.jit
    def summary(curvature):
        outputs = curvature.linearized(direction)
        form = curvature.output_product(outputs, outputs)
        return (curvature.factors, *curvature[1:3], form, outputs, curvature.displaced(direction))

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

    @jax.jit
    def step(params, state):
        parts = [curvature_fn(params, (x[i : i + 4], y[i : i + 4])) for i in (0, 4)]
        grads = jax.tree.map(lambda a, b: (a + b) / 2, *[grads for (_, grads), _ in parts])
        curvature = kfgn.average_curvature([curvature for _, curvature in parts])
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert objective(params, (x, y)) < before


@pytest.mark.parametrize("wrong", [[], [1.0]])
def test_nothing_to_average(wrong):
    with pytest.raises(kfgn.errors.OptionError, match=r"expected one kfgn\.Curvature or more"):
        kfgn.average_curvature(wrong)


@pytest.mark.parametrize(
    ("options", "l2", "found"),
    [
        ({"method": "kflr"}, 1e-2, "method='kfra' and method='kflr'"),
        ({"sharing": "reduce"}, 1e-2, "sharing='expand' and sharing='reduce'"),
        ({"model_examples": 4, "unassigned": "diagonal"}, 0.0, "l2=0.01 and l2=0.0"),
    ],
)
def test_different_settings_have_no_average(options, l2, found):
    """Also after a jit, and the error names what differs."""
    objective, params, x, y = _problem()
    other = kfgn.Objective(objective.model, objective.loss, l2=l2)
    functions = (
        kfgn.value_grad_and_curvature(objective),
        kfgn.value_grad_and_curvature(other, **options),
    )
    parts = [jax.jit(function)(params, (x, y))[1] for function in functions]
    with pytest.raises(kfgn.errors.OptionError, match=found):
        kfgn.average_curvature(parts)


def test_settings_are_static():
    """They have no leaves and survive what pytrees go through; an array's l2 is not known."""
    objective, params, x, y = _problem()
    function = kfgn.value_grad_and_curvature(objective, "kflr", sharing="reduce")
    expected = kfgn.curvature.CurvatureSettings("kflr", 1, "reduce", "joint", 256, "block", 1e-2)
    curvature = jax.jit(function)(params, (x, y))[1]
    assert curvature.settings == expected
    assert jax.tree.leaves(curvature.settings) == []
    assert jax.tree.map(jnp.negative, curvature).settings == expected
    assert jax.jit(lambda c: c._replace(value=-c.value))(curvature).settings == expected
    many = jax.tree.map(lambda a: jnp.stack([a, a]), params)
    of_many = jax.vmap(lambda p: (lambda c: (c.value, c.settings))(function(p, (x, y))[1]))
    values, found = jax.jit(of_many)(many)
    assert values.shape == (2,) and found == expected
    of_array = kfgn.Objective(objective.model, objective.loss, l2=jnp.float32(0.1))
    found = kfgn.value_grad_and_curvature(of_array)(params, (x, y))[1].settings
    assert found.l2 is None and found.method == "kfra"
