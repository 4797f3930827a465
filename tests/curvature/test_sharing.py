"""Weight sharing: where "expand" and "reduce" are exact, and what "homogeneous" assumes.

Dense truth by jax.jacobian, in float64; tolerances are roundoff of a few
hundred operations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.curvature.channels import Homogeneous, layouts
from kfgn.curvature.recursion import Walk
from kfgn.model.graph.build_graph import build_graph
from tests.tables.architectures import LOSSES, ROWS, make_targets

pytestmark = pytest.mark.usefixtures("x64")
CLOSE = {"rtol": 0, "atol": 1e-12}


def deep_linear(p, x):
    """Two layers on every position alone."""
    return (x @ p["first"]["w"] + p["first"]["b"]) @ p["out"]["w"] + p["out"]["b"]


def pooled(p, x):
    return jnp.mean(deep_linear(p, x), axis=1)


def convolved(p, x):
    """A linear convolution without padding, whose places are all alike, then their mean."""
    numbers = ("NWC", "WIO", "NWC")
    h = jax.lax.conv_general_dilated(x, p["first"]["w"], (1,), "VALID", dimension_numbers=numbers)
    return jnp.mean(h + p["first"]["b"], axis=1) @ p["out"]["w"] + p["out"]["b"]


def siamese(p, x):
    """The same linear layer on two inputs, each with targets of its own."""
    return jnp.concatenate([deep_linear(p, x[:, 0]), deep_linear(p, x[:, 1])], axis=1)


def case(model, kernel=(3, 2), shape=(4, 3)):
    rng = np.random.default_rng(0)
    params = {
        "first": {"w": jnp.asarray(rng.normal(size=kernel)), "b": jnp.asarray(rng.normal(size=2))},
        "out": {"w": jnp.asarray(rng.normal(size=(2, 2))), "b": jnp.asarray(rng.normal(size=2))},
    }
    inputs = jnp.asarray(rng.normal(size=(5, *shape)))
    targets = jnp.asarray(rng.normal(size=model(params, inputs).shape))
    return kfgn.Objective(model, kfgn.losses.half_squared_error), params, (inputs, targets)


def gauss_newton_block(objective, params, inputs, name):
    """`J'J / N` of one layer, in the order kernel, bias."""

    def outputs(layer):
        return objective.model({**params, name: layer}, inputs).reshape(len(inputs), -1)

    jacobian = jax.jacobian(outputs)(params[name])
    parts = [jacobian[k].reshape(*jacobian[k].shape[:2], -1) for k in ("w", "b")]
    whole = jnp.concatenate(parts, axis=-1)
    return jnp.einsum("nka,nkb->ab", whole, whole) / len(inputs)


def as_matrix(name, params, block):
    """A convolution's kernel lists its channels first, then the places of a patch."""
    w = params[name]["w"]
    if w.ndim == 2:
        return block
    order = np.arange(w.size).reshape(w.shape).transpose(1, 0, 2).reshape(-1)
    order = np.concatenate([order, np.arange(w.size, len(block))])
    return block[order][:, order]


EXACT = {
    "expand": (deep_linear, "expand", {}),
    "expand, tied": (siamese, "expand", {"shape": (2, 3)}),
    "reduce": (pooled, "reduce", {}),
    "reduce, convolution": (convolved, "reduce", {"kernel": (2, 3, 2)}),
}


@pytest.mark.parametrize("method", ["kflr", "kfra"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_where_theory_says_so(name, method):
    """Linear nets with squared error; N and the number of places are above one."""
    model, sharing, options = EXACT[name]
    objective, params, batch = case(model, **options)
    function = kfgn.value_grad_and_curvature(objective, method, sharing=sharing)
    _, curvature = jax.jit(function)(params, batch)
    truths = jax.jit(
        lambda params, inputs: {
            layer: gauss_newton_block(objective, params, inputs, layer)
            for layer in curvature.factors
        }
    )(params, batch[0])
    for layer, (q, g) in curvature.factors.items():
        truth = as_matrix(layer, params, np.asarray(truths[layer]))
        np.testing.assert_allclose(np.kron(q, g), truth, **CLOSE)


@pytest.mark.parametrize(("model", "sharing"), [(deep_linear, "reduce"), (pooled, "expand")])
def test_the_other_one_is_not(model, sharing):
    """So that the test above can fail."""
    objective, params, batch = case(model)
    function = kfgn.value_grad_and_curvature(objective, "kflr", sharing=sharing)
    _, curvature = jax.jit(function)(params, batch)
    truth = gauss_newton_block(objective, params, batch[0], "first")
    q, g = curvature.factors["first"]
    assert np.linalg.norm(jnp.kron(q, g) - truth) > 0.1 * np.linalg.norm(truth)


@pytest.mark.parametrize("name", ["matmul", "residual", "glu", "conv_1d_whole", "layer_norm"])
def test_homogeneous_is_joint_without_positions(name):
    factors = [recursion(name, spatial) for spatial in ("joint", "homogeneous")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), *factors)


@pytest.mark.parametrize("name", ["conv_1d", "conv_2d_groups", "conv_2d_channels_first"])
def test_homogeneous_is_joint_for_one_convolution(name):
    """Behind the mean over positions there is no assumption left to make."""
    factors = [recursion(name, spatial) for spatial in ("joint", "homogeneous")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), *factors)


def recursion(name, spatial):
    row = ROWS[name]
    with jax.numpy_dtype_promotion(row.promotion):
        model, params, inputs = row.case(count=6)
        objective = kfgn.Objective(model, LOSSES[ROWS[name].loss].loss)
        batch = (inputs, make_targets(name, row.case(count=6)))
        function = kfgn.value_grad_and_curvature(objective, "kfra", spatial=spatial)
        return jax.jit(lambda *args: function(*args)[1].factors)(params, batch)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"window_strides": (2, 1)},
    "padded": {"padding": ((2, 1), (0, 2))},
    "dilated kernel": {"rhs_dilation": (1, 2)},
    "dilated input": {"lhs_dilation": (2, 1)},
    "groups": {"feature_group_count": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_homogeneous_convolution(name):
    """`sum_t (J' (I ⊗ Ω) J)_tt / T` with J by jax.jacobian."""
    options = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), **CONVOLUTIONS[name]}
    numbers = ("NHWC", "HWIO", "NHWC")
    rng = np.random.default_rng(0)
    groups = options.get("feature_group_count", 1)
    kernel = jnp.asarray(rng.normal(size=(2, 3, 4 // groups, 2)))
    params = {"a": jnp.asarray(rng.normal(size=(4, 4))), "k": kernel}

    def convolve(h, kernel):
        return jax.lax.conv_general_dilated(h, kernel, dimension_numbers=numbers, **options)

    def model(p, x):
        return jnp.tanh(convolve(x @ p["a"], p["k"]))

    inputs = jnp.asarray(rng.normal(size=(3, 4, 5, 4)))
    graph = build_graph(kfgn.Objective(model, kfgn.losses.half_squared_error), params, inputs)
    (node,) = [n for n in graph.nodes if n.use is not None and n.use.form.kind == "conv"]
    (i,), (o,) = node.inputs, node.outputs
    root = rng.normal(size=(2, 2))
    omega = jnp.asarray(root @ root.T)
    jacobian = Homogeneous(node, Walk(graph, graph.shared_values(params), {}), layouts(graph))

    @jax.jit
    def both(omega, inputs):
        dense = jax.jacobian(lambda h: convolve(h[None], kernel)[0])(inputs)
        dense = dense.reshape(-1, 2, 4 * 5, 4)
        truth = jnp.einsum("poic,oq,pqid->cd", dense, omega, dense) / 20
        return jacobian.congruence({(o, o): omega}, i, i), truth

    found, truth = both(omega, inputs[0])
    np.testing.assert_allclose(found, truth, **CLOSE)


def test_a_bias_that_slices_of_a_kernel_share_is_a_layer_of_its_own():
    def model(p, x):
        for k in range(2):
            x = jnp.tanh(x @ p["stack"][k] + p["shift"])
        return x

    rng = np.random.default_rng(0)
    params = {"stack": jnp.asarray(rng.normal(size=(2, 3, 3))), "shift": jnp.ones(3)}
    batch = (jnp.asarray(rng.normal(size=(5, 3))), jnp.ones((5, 3)))
    layers = kfgn.layers.find_blocks(
        kfgn.Objective(model, kfgn.losses.half_squared_error), params, batch
    ).layers
    assert {n: layer.parameters for n, layer in layers.items()} == {
        "stack": ("stack",),
        "shift": ("shift",),
    }
    for layer in layers.values():
        leaves = {n: params[n] for n in layer.parameters}
        back = layer.from_matrix(layer.to_matrix(leaves))
        jax.tree.map(np.testing.assert_array_equal, back, leaves)
