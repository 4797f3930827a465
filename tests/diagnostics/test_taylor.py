"""Checks of derivatives find what is right and what is wrong."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params

PRECISIONS = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


def rosenbrock(point):
    """Eq. 6 of Veitch, of a dictionary."""
    x, y = point["x"], point["y"]
    return (1 - x) ** 2 + 50 * (y - x**2) ** 2


def rosenbrock_point(dtype):
    return {"x": jnp.asarray(-0.4, dtype), "y": jnp.asarray(1.3, dtype)}


def network(dtype):
    """The objective of a small network, its parameters, and its Hessian's product."""
    batch = make_batch(dtype, count=8)
    product = functools.partial(kfgn.hessian(OBJECTIVE).matvec, with_l2=True)
    return lambda p: OBJECTIVE(p, batch), make_params(dtype), lambda p, v: product(p, batch, v)


def hessian_product(function):
    return lambda p, v: jax.jvp(jax.grad(function), (p,), (v,))[1]


# What is right.


def all_pass(checks, expected):
    """All pass, with the expected order; a random direction may have a higher one."""
    assert all(found.passed and found.expected == expected for found in checks)
    assert not any(found.exact for found in checks)
    assert abs(np.median([found.order for found in checks]) - expected) < 0.2


@pytest.mark.usefixtures("x64")
@PRECISIONS
@pytest.mark.parametrize("central", [False, True])
def test_gradients(dtype, central):
    """Order 2, one-sided and by the central difference of eq. 31."""
    for function, point in ((rosenbrock, rosenbrock_point(dtype)), network(dtype)[:2]):
        keys = jax.random.split(jax.random.key(0), 3)
        checks = [
            kfgn.diagnostics.gradient_check(function, point, key=k, central=central) for k in keys
        ]
        all_pass(checks, 2)


@pytest.mark.usefixtures("x64")
@PRECISIONS
def test_curvature(dtype):
    """Order 3 with the quadratic term."""
    rosen = (rosenbrock, rosenbrock_point(dtype), hessian_product(rosenbrock))
    for function, point, product in (rosen, network(dtype)):
        keys = jax.random.split(jax.random.key(0), 3)
        checks = [kfgn.diagnostics.curvature_check(function, point, product, key=k) for k in keys]
        all_pass(checks, 3)


def test_only_steps_above_rounding_are_used():
    """In float32 the remainder meets the rounding of f, and stops shrinking."""
    function, point, _ = network(jnp.float32)
    found = kfgn.diagnostics.gradient_check(function, point, halvings=20)
    assert found.steps.shape == found.remainders.shape == found.above_rounding.shape == (21,)
    np.testing.assert_allclose(found.steps, 0.5 * 0.5 ** np.arange(21), rtol=1e-6)
    used = int(found.above_rounding.sum())
    assert 3 <= used < 15 and found.above_rounding[:used].all()


def test_point_and_direction_of_any_tree():
    """The direction may be chosen; a pytree of several leaves, tuples among them."""
    point = (jnp.ones(3), {"a": jnp.full((2, 2), 0.5)}, [jnp.asarray(2.0)])

    def function(point):
        x, rest, (scale,) = point
        return scale**3 * jnp.sum(jnp.sin(x)) + jnp.sum(jnp.exp(rest["a"])) * scale

    direction = jax.tree.map(jnp.ones_like, point)
    assert kfgn.diagnostics.gradient_check(function, point, direction).passed
    assert kfgn.diagnostics.curvature_check(
        function, point, hessian_product(function), direction
    ).passed


@pytest.mark.usefixtures("x64")
def test_functions_without_higher_terms():
    """Nothing of the remainder is left: there is no order, and the check passes."""
    matrix, point = jnp.asarray([[2.0, 1.0], [1.0, -3.0]]), jnp.asarray([1.0, 2.0])
    linear = kfgn.diagnostics.gradient_check(lambda x: jnp.sum(matrix[0] * x), point)
    assert linear.exact and linear.passed and np.isnan(linear.order)
    quadratic = kfgn.diagnostics.curvature_check(
        lambda x: x @ matrix @ x / 2, point, lambda p, v: matrix @ v
    )
    assert quadratic.exact and quadratic.passed


def test_nothing_is_concluded_from_a_constant():
    """No term is above rounding: that is no success."""
    found = kfgn.diagnostics.gradient_check(lambda x: 1e6 + 0 * jnp.sum(x), jnp.ones(2))
    assert not found.exact and not found.passed and np.isnan(found.order)


@pytest.mark.parametrize("central", [False, True])
def test_infinite_values_are_passed_over(central):
    """The largest steps overflow, on both sides."""
    found = kfgn.diagnostics.gradient_check(
        lambda x: jnp.sum(jnp.exp(x) + jnp.exp(-2 * x)),
        jnp.zeros(1),
        jnp.ones(1),
        step=128.0,
        central=central,
    )
    assert not np.isfinite(found.remainders[0])
    assert found.passed and abs(found.order - 2) < 0.2


def test_steps_too_large_to_be_evaluated_are_passed_over():
    found = kfgn.diagnostics.gradient_check(
        lambda x: jnp.sum(jnp.log(x)), jnp.full(2, 0.5), -jnp.ones(2), step=2.0
    )
    assert not np.isfinite(found.remainders[0]) and not found.above_rounding[0]
    assert found.passed and abs(found.order - 2) < 0.2


# What is wrong.


@pytest.mark.usefixtures("x64")
@PRECISIONS
@pytest.mark.parametrize(("central", "order"), [(False, 1), (True, 0)])
def test_wrong_gradients(dtype, central, order):
    """One order less, or none at all in the central difference."""
    function, point, _ = network(dtype)

    def gradient(p):
        wrong = jax.grad(function)(p)
        return {**wrong, "out": jax.tree.map(lambda g: 1.1 * g, wrong["out"])}

    found = kfgn.diagnostics.gradient_check(function, point, gradient=gradient, central=central)
    assert not found.passed and abs(found.order - order) < 0.2


def test_wrong_custom_rules():
    """A function whose own derivative rule is not its derivative."""

    @jax.custom_jvp
    def surrogate(x):
        return jnp.tanh(x)

    surrogate.defjvp(lambda p, t: (surrogate(*p), 0.5 * t[0]))
    assert not kfgn.diagnostics.gradient_check(lambda x: jnp.sum(surrogate(x)), jnp.ones(3)).passed


@pytest.mark.usefixtures("x64")
@PRECISIONS
def test_wrong_curvature(dtype):
    """The Gauss-Newton matrix is not the Hessian; nor is a Hessian without its penalty."""
    function, point, _ = network(dtype)
    batch = make_batch(dtype, count=8)
    gauss_newton = functools.partial(kfgn.gauss_newton(OBJECTIVE).matvec, with_l2=True)
    found = kfgn.diagnostics.curvature_check(
        function, point, lambda p, v: gauss_newton(p, batch, v)
    )
    assert not found.passed and abs(found.order - 2) < 0.2


# Bad input.


def square(x):
    return jnp.sum(x**2)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda p: kfgn.diagnostics.gradient_check(3, p),
            kfgn.errors.OptionError,
            "must be callable",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(jnp.sin, p),
            kfgn.errors.OptionError,
            "floating-point scalar",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(lambda x: jnp.sum(jnp.log(-x)), p),
            kfgn.errors.OptionError,
            "finite at the point, found nan",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, ()),
            kfgn.errors.ParameterError,
            "has no leaves",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, jnp.ones(2, int)),
            kfgn.errors.ParameterError,
            "floating-point array, found dtype int32",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, 1.0),
            kfgn.errors.ParameterError,
            "found a float",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, jnp.ones(3)),
            kfgn.errors.ParameterError,
            r"must have shape \(2,\)",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, 0 * p),
            kfgn.errors.OptionError,
            "direction is zero",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, step=0.0),
            kfgn.errors.OptionError,
            "step must be pos",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, halvings=0),
            kfgn.errors.OptionError,
            "halvings",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, central=1),
            kfgn.errors.OptionError,
            "central must be",
        ),
        (
            lambda p: kfgn.diagnostics.gradient_check(square, p, gradient=lambda p: p[:1]),
            kfgn.errors.ParameterError,
            r"must have shape \(2,\)",
        ),
        (
            lambda p: kfgn.diagnostics.curvature_check(square, p, lambda p, v: v[:1]),
            kfgn.errors.ParameterError,
            r"must have shape \(2,\)",
        ),
        (
            lambda p: kfgn.diagnostics.curvature_check(square, p, None),
            kfgn.errors.OptionError,
            "product must be",
        ),
    ],
)
def test_bad_input(act, error, message):
    with pytest.raises(error, match=message):
        act(jnp.ones(2))
