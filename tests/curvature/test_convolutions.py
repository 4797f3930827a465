"""Convolutions of lazy factors have the order of axes that XLA is fast at on CPUs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.curvature.convolutions import run_in_order

LAYOUTS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
OTHERS = [
    (1, ("NCW", "OIW", "NCW")),
    (1, ("WNC", "IOW", "CWN")),
    (2, ("NCHW", "OIHW", "NCHW")),
    (2, ("NHWC", "HWOI", "NHWC")),
    (3, ("CDHWN", "IDHWO", "NDHWC")),
]


def turned(array, given, wanted):
    return jnp.transpose(array, [given.index(axis) for axis in wanted])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("space", "layout"), OTHERS)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_order_of_axes(space, layout, jit, groups):
    """Strides, dilations and padding stay with their axes; the same sums, to roundoff."""
    plain = LAYOUTS[space]
    lengths = range(5, 5 + space)
    x = jax.random.normal(jax.random.key(0), (3, *lengths, 4))
    w = jax.random.normal(jax.random.key(1), (*(2, 3, 2)[:space], 4 // groups, 6))
    options = {
        "window_strides": (2, 1, 1)[:space],
        "padding": ((1, 0), (0, 2), (1, 1))[:space],
        "lhs_dilation": (1, 2, 1)[:space],
        "rhs_dilation": (2, 1, 1)[:space],
        "feature_group_count": groups,
    }

    def convolved(x, w, layout):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)

    def in_loop(x, w):
        """The constant stays one of the jaxpr."""
        body = convolved if not jit else jax.jit(convolved, static_argnums=2)
        return body(x, w, layout) + OFFSET, x

    arguments = turned(x, plain[0], layout[0]), turned(w, plain[1], layout[1])
    program = jax.make_jaxpr(in_loop)(*arguments)
    found, same = run_in_order(program.jaxpr, program.consts, list(arguments))
    expected = turned(convolved(x, w, plain), plain[2], layout[2])
    # Sums of some 50 products in another order.
    np.testing.assert_allclose(found - 0.5, expected, rtol=1e-12, atol=1e-12)
    assert same is arguments[0]
    lowered = jax.jit(lambda *a: run_in_order(program.jaxpr, program.consts, list(a))).lower(
        *arguments
    )
    data = "b, " + ", ".join(map(str, range(space))) + ", f"
    kernel = data.replace("b, ", "").replace("f", "i, o")
    labels = re.findall(r"dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]", lowered.as_text())
    assert labels == [(data, kernel, data)]


OFFSET = np.float64(0.5)


def test_other_platforms_have_their_own_order():
    layout = ("NCHW", "OIHW", "NCHW")

    def convolved(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 3, 4, 4), (5, 3, 2, 2)))
    program = jax.make_jaxpr(convolved)(*shapes)
    run = jax.jit(lambda *a: run_in_order(program.jaxpr, program.consts, list(a)))
    for platform, order in (("cuda", "b, f, 0, 1"), ("cpu", "b, 0, 1, f")):
        text = run.trace(*program.in_avals).lower(lowering_platforms=(platform,)).as_text()
        assert f"[{order}]x" in text


def test_a_program_in_order_stays_as_it_is():
    program = jax.make_jaxpr(lambda x, w: jnp.tanh(x @ w))(jnp.ones((2, 3)), jnp.ones((3, 4)))
    again = jax.make_jaxpr(lambda *a: run_in_order(program.jaxpr, [], list(a)))(*program.in_avals)
    assert str(again) == str(program)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_have_bodies_in_order(reverse):
    """With constants, states, slices and what is stacked."""
    layout = ("NCW", "OIW", "NCW")
    kernels = jax.random.normal(jax.random.key(1), (3, 2, 2, 3))

    def model(x, shift):
        def body(carry, kernel):
            h = jax.lax.conv_general_dilated(carry, kernel, (1,), "SAME", dimension_numbers=layout)
            return jnp.tanh(h + shift), jnp.sum(h)

        return jax.lax.scan(body, x, kernels, reverse=reverse)

    arguments = jax.random.normal(jax.random.key(0), (4, 2, 5)), jnp.array(0.5)
    program = jax.make_jaxpr(model)(*arguments)
    run = jax.jit(lambda *a: run_in_order(program.jaxpr, program.consts, list(a)))
    for found, expected in zip(run(*arguments), model(*arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)  # sums of 12
    text = run.lower(*arguments).as_text()
    assert "[b, 0, f]x[0, i, o]->[b, 0, f]" in text and "[b, f, 0]x" not in text


@pytest.mark.parametrize("method", ["kfac", "kflr"])
@pytest.mark.parametrize("layout", [LAYOUTS[2], ("NCHW", "OIHW", "NCHW")])
def test_an_update_has_no_transposed_kernels(layout, method):
    """Not in its loops: there XLA leaves axes in the order that they have."""

    def model(p, x):
        x = turned(x, LAYOUTS[2][0], layout[0])
        for name in ("a", "b"):
            kernel = turned(p[name], LAYOUTS[2][1], layout[1])
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
            x = jnp.tanh(x)
        return jnp.mean(turned(x, layout[2], LAYOUTS[2][2]), axis=(1, 2))

    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    params = {"a": jnp.ones((3, 3, 2, 4)), "b": jnp.ones((3, 3, 4, 5))}
    batch = jnp.ones((6, 4, 4, 2)), jnp.ones((6, 5))
    optimizer, curvature_fn = kfgn.make(objective, params, batch, method=method)

    @jax.jit
    def step(params, state, batch, key):
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        return optimizer.update(grads, state, params, curvature=curvature)

    state = optimizer.init(params)
    text = step.lower(params, state, batch, jax.random.key(0)).compile().as_text()
    found = re.findall(r"convolution\(.*?dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert len(found) > 6 and set(found) == {("b01f", "01io", "b01f")}
