"""Factors that wait until they are asked for are those that are computed at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.curvature import batch as measuring
from kfgn.curvature.lazy_factors import known
from tests.tables.small import LOSS, OBJECTIVE, assert_close, make_batch, make_params, network


def assert_equal_shapes(actual, expected):
    of = jax.tree.map(lambda x: (x.shape, x.dtype), (actual, expected))
    assert of[0] == of[1]


def scaled(params, inputs):
    return network(params, inputs) * jnp.exp(params["scale"])


def one_output(params, inputs):
    return network(params, inputs)[:, :1]


WITH_SCALE = kfgn.Objective(scaled, LOSS)
ONE_OUTPUT = kfgn.Objective(one_output, kfgn.losses.half_squared_error)
CASES = {
    "kfra": (OBJECTIVE, "kfra", {}),
    "kflr": (OBJECTIVE, "kflr", {}),
    "kfac": (OBJECTIVE, "kfac", {"samples": 2}),
    "one output": (ONE_OUTPUT, "kflr", {}),  # whose backward pass serves the gradient as well
    "block of its own": (WITH_SCALE, "kflr", {}),
}


def setting(objective, seed=0):
    params, (inputs, labels) = make_params(seed=seed), make_batch(seed=seed, count=6)
    if objective is WITH_SCALE:
        params["scale"] = jnp.full((), 0.1)
    return params, (inputs, inputs[:, :1] if objective is ONE_OUTPUT else labels)


def measured(objective, method, options, key):
    function = kfgn.value_grad_and_curvature(objective, method, **options)
    keys = {"key": key} if method == "kfac" else {}
    return lambda params, batch: function(params, batch, **keys)[1]


@pytest.mark.parametrize("name", CASES)
def test_lazy_factors_equal_eager_ones(name, monkeypatch):
    """In one jit, across two, and out of a `vmap`; in the order of the layers."""
    objective, *how = CASES[name]
    function = measured(objective, *how, jax.random.key(1))
    arguments = setting(objective)

    def factors_of(params, batch):
        return function(params, batch).factors

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "lazily", lambda factors_of: known(factors_of()))
        expected = jax.jit(lambda *both: function(*both).factors)(*arguments)
    assert_close(jax.jit(factors_of)(*arguments), expected, 1e-6)
    curvature = jax.jit(function)(*arguments)
    read = jax.jit(lambda c: c.factors)
    assert_close(read(curvature), expected, 1e-6)
    assert curvature.blocks == tuple(curvature.factors) and set(curvature.blocks) == set(expected)
    at_once = curvature.with_factors(expected)
    assert at_once.blocks == tuple(expected)
    assert_close(jax.jit(lambda c: c)(at_once).factors, expected, 0)
    several = jax.tree.map(lambda *x: jnp.stack(x), arguments, setting(objective, seed=1))
    curvatures = jax.jit(jax.vmap(function))(*several)  # what reads the key has it in common
    for found in (jax.jit(jax.vmap(lambda c: c.factors))(curvatures), read(curvatures)):
        assert_close(jax.tree.map(lambda x: x[0], found), expected, 1e-6)
    mean = jax.jit(jax.vmap(lambda c: kfgn.average_curvature([c, c])))(curvatures)
    assert_close(mean.factors, read(curvatures), 1e-6)
    assert_equal_shapes(jax.eval_shape(function, *arguments).factors, expected)


def test_gradient_of_one_output_needs_no_second_backward_pass():
    """The derivatives that the factors read are those that made the gradient."""
    params, batch = setting(ONE_OUTPUT)
    function = measured(ONE_OUTPUT, "kflr", {}, None)
    curvature = jax.eval_shape(function, params, batch)
    text = jax.jit(lambda c: c.factors).lower(curvature).compile().as_text()
    assert text.count(" dot(") == 4  # two second moments for each layer, and nothing else


def test_nothing_is_computed_before_it_is_asked_for():
    """With "kflr" a curvature costs what its gradient and quadratic model do."""
    params, batch = make_params(), make_batch(count=256)
    flops = {}
    for method in ("kfra", "kflr", "empirical"):
        function = kfgn.value_grad_and_curvature(OBJECTIVE, method, model_examples=1)
        of_gradient = jax.jit(lambda *both, f=function: f(*both)[0])
        whole = jax.jit(lambda *both, f=function: f(*both)[1].lazy_factors.args)
        first = jax.jit(lambda *both, f=function: (f(*both)[0], f(*both)[1].factors))
        flops[method] = [
            f.lower(params, batch).compile().cost_analysis()["flops"]
            for f in (of_gradient, whole, first)
        ]
    for gradient, read, factors in flops.values():
        assert read < gradient + 1 and factors > 1.3 * gradient, flops
    np.testing.assert_array_less(flops["empirical"][2], flops["kflr"][2])


def test_gradient_costs_what_that_of_jax_does():
    """Nothing of a batch is copied that `jax.value_and_grad` would not, transposed for one."""
    objective = kfgn.Objective(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], kfgn.losses.half_squared_error
    )
    params = {"a": jnp.ones((48, 64)), "b": jnp.ones((64, 4))}
    batch = jnp.ones((128, 48)), jnp.ones((128, 4))
    ours = kfgn.value_grad_and_curvature(objective, "empirical")
    costs = [
        jax.jit(function).lower(params, batch).compile().cost_analysis()
        for function in (jax.value_and_grad(objective), lambda *both: ours(*both)[0])
    ]
    # With a copy of the hidden values 10% more; jax 0.12 writes down a constant like the outputs.
    for name in ("flops", "bytes accessed"):
        assert costs[1][name] < 1.01 * costs[0][name]
