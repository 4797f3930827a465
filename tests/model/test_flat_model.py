"""Flattening: loops become single equations, and `custom_vjp` functions stay one each."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.base.errors import ModelError
from kfgn.curvature.linear_pass import linear_pass
from kfgn.model.flatten.flat_model import FlatModel, flatten_model
from kfgn.model.program.dependence import is_elementwise
from kfgn.model.program.equations import Role, evaluate, read, variables

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, dtype=np.float64):
    # numpy's, for jax has no float64 outside of tests.
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def primitives(flat: FlatModel) -> set[str]:
    return {equation.primitive.name for equation in flat.jaxpr.eqns}


def called(flat: FlatModel, name: str) -> list:
    return [equation for equation in flat.jaxpr.eqns if equation.primitive.name == name]


def evaluated(flat: FlatModel, params, inputs):
    """The flat model on a batch."""

    def one(example):
        env = dict(flat.constants)
        env.update(zip(flat.parameters.values(), jax.tree.leaves(params), strict=True))
        env.update(zip(flat.inputs, jax.tree.leaves(example), strict=True))
        evaluate(flat.jaxpr.eqns, env)
        outputs = [read(env, v) for v in flat.outputs]
        return jax.tree.unflatten(flat.output_tree, outputs)

    return jax.vmap(one)(inputs)


def close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def check(model, params, inputs, reference=None) -> FlatModel:
    """The flat model has the values and all derivatives of the reference, or of the model."""
    params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
    flat, reference = flatten_model(model, params, inputs), reference or model
    direction = jax.tree.map(jnp.cos, params)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(function, params):
        def loss(p):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(p)))

        outputs, push = jax.linearize(function, params)
        pulled = jax.vjp(function, params)[1](outputs)
        transposed = jax.linear_transpose(push, params)(outputs)
        hessian = jax.jvp(jax.grad(loss), (params,), (direction,))[1]
        return outputs, push(direction), pulled, transposed, hessian

    ours = everything(lambda p: evaluated(flat, p, inputs), params)
    close(ours, everything(lambda p: reference(p, inputs), params))
    return flat


# Loops.

X = normal(4, 3)
STACK = {"w": normal(2, 3, 3, seed=1), "b": normal(2, 3, seed=2)}
SINGLE = {"w": normal(3, 3, seed=1), "b": normal(3, seed=2)}
CELL = {"w": normal(2, 3, seed=3), "u": normal(3, 3, seed=4)}
SEQUENCE = normal(4, 3, 2, seed=5)


def layer(h, p):
    return jnp.tanh(h @ p["w"] + p["b"])


def layers(p, x, body=layer, **options):
    return jax.lax.scan(lambda h, q: (body(h, q), None), x, p, **options)[0]


def cell(p, h, v):
    return jnp.tanh(v @ p["w"] + h @ p["u"])


def recurrent(p, x, body=cell, **options):
    def step(h, v):
        h = body(p, h, v)
        return h, h

    start = jnp.zeros((x.shape[0], 3), x.dtype)
    last, states = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1), **options)
    return last, jnp.swapaxes(states, 0, 1)


def nested(p, x):
    """A scan over time in a scan over layers, that hands on constants, integers and floats."""

    def over_layers(carry, w):
        h, count, scale = carry
        _, states = jax.lax.scan(
            lambda s, v: (jnp.tanh(s @ w + v), s * 1.0), h, jnp.ones((2, 3)), reverse=True
        )
        return (states[1] * scale, count + 1, scale * 0.5), (states[0], count)

    (h, _, scale), (rows, counts) = jax.lax.scan(over_layers, (x, 0, 1.0), p["w"])
    return h * scale, jnp.swapaxes(rows, 0, 1), jnp.broadcast_to(counts * 1.0, (x.shape[0], 2))


def with_keys(p, x):
    """A loop over random keys, that hands them on, too."""

    def step(carry, key):
        h, first = carry
        noise = jax.random.normal(jax.random.fold_in(first, 1), (3,), x.dtype)
        return (h @ p + noise, key), key

    key = jax.random.key(0)
    (h, _), keys = jax.lax.scan(step, (x, key), jax.random.split(key, 3))
    return h + jax.random.uniform(keys[2], (), x.dtype)


LOOPS = {
    "layers": (layers, STACK, X),
    "reverse": (functools.partial(layers, reverse=True), STACK, X),
    "unroll": (functools.partial(layers, unroll=2), STACK, X),
    "jit_remat": (functools.partial(layers, body=jax.jit(jax.checkpoint(layer))), STACK, X),
    "under_jit": (jax.jit(layers), STACK, X),
    "one_layer": (layers, jax.tree.map(lambda a: a[:1], STACK), X),
    "recurrent": (recurrent, CELL, SEQUENCE),
    "recurrent_reverse": (functools.partial(recurrent, reverse=True), CELL, SEQUENCE),
    "nested": (nested, STACK, X),
    "map": (lambda p, x: jax.lax.map(lambda v: layer(v, p), x), SINGLE, X),
    "fori": (lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: layer(h, p), x), SINGLE, X),
    "keys": (with_keys, STACK["w"][0], X),
    "parameters_only": (
        lambda p, x: x @ jax.lax.scan(lambda a, _: (a @ a, None), p, length=2)[0],
        STACK["w"][0],
        X,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_unrolled(name):
    flat = check(*LOOPS[name])
    assert "scan" not in primitives(flat)


def test_loop_without_iterations():
    """Its states stay, and its rows are none."""

    def model(p, x):
        h, rows = jax.lax.scan(lambda h, w: (h @ w, h), x @ p["in"], p["layers"])
        return h, jnp.swapaxes(rows, 0, 1)

    flat = check(model, {"in": normal(3, 3), "layers": jnp.zeros((0, 3, 3))}, X)
    assert "scan" not in primitives(flat)
    assert len(called(flat, "dot_general")) == 1


def test_lower_precision():
    """Literals that a loop hands on, or stacks, have the dtype of the loop."""

    def model(p, x):
        def step(h, v):
            return jnp.asarray(0.5, x.dtype), (jnp.asarray(2.0, x.dtype), h * (v @ p))

        last, (two, rows) = jax.lax.scan(step, jnp.asarray(0.25, x.dtype), jnp.stack([x, x]))
        return last * rows[1] + two[0] * rows[0]

    params, inputs = normal(3, 3, dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    flat = flatten_model(model, params, inputs)
    assert flat.outputs[0].aval.dtype == jnp.bfloat16
    found, expected = evaluated(flat, params, inputs), model(params, inputs)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), rtol=0.02)


def test_slices_of_stacked_parameters():
    """A layer's kernel is a static slice of the stack, without its leading axis."""
    flat = flatten_model(layers, STACK, X)
    producer = {v: equation for equation in flat.jaxpr.eqns for v in equation.outvars}
    starts = []
    for product in called(flat, "dot_general"):
        squeezed = producer[product.invars[1]]
        sliced = producer[squeezed.invars[0]]
        assert (squeezed.primitive.name, sliced.primitive.name) == ("squeeze", "slice")
        assert squeezed.params["dimensions"] == (0,)
        assert sliced.invars[0] is flat.parameters["w"]
        starts.append(sliced.params["start_indices"][0])
    assert starts == [0, 1]


def test_rows_are_stacked():
    flat = flatten_model(lambda p, x: recurrent(p, x)[1], CELL, SEQUENCE)
    (stack,) = called(flat, "concatenate")
    assert [v.aval.shape for v in stack.invars] == [(1, 1, 3)] * 3


def test_loops_over_data_stay():
    """What depends on no parameter is not differentiated."""

    def model(p, x):
        _, sums = jax.lax.scan(lambda s, v: (s + v, s * v), jnp.zeros(x.shape[0]), x.T)
        return sums.T @ p

    flat = check(model, normal(3, 2), X)
    assert len(called(flat, "scan")) == 1
    assert "optimization_barrier" not in primitives(flat)


# Roles.


def roles(flat, name):
    return [[flat.roles[v] for v in equation.outvars] for equation in called(flat, name)]


def test_first_state_is_data():
    """A constant that data enters is from the start what it becomes."""
    flat = flatten_model(recurrent, CELL, SEQUENCE)
    assert roles(flat, "optimization_barrier") == [[Role.PASSIVE]]
    products = called(flat, "dot_general")
    meets_state = [e for e in products if e.invars[1] is flat.parameters["u"]]
    states = [flat.roles[equation.invars[0]] for equation in meets_state]
    assert states == [Role.PASSIVE, Role.ACTIVE, Role.ACTIVE]
    assert roles(flat, "dot_general") == [[Role.ACTIVE]] * 6


def test_states_that_data_does_not_enter():
    """Counters and schedules stay constants, products of parameters stay parameters."""
    flat = flatten_model(nested, STACK, X)
    assert "optimization_barrier" not in primitives(flat)

    def model(p, x):
        power, _ = jax.lax.scan(lambda a, _: (a @ p, None), jnp.eye(3), length=2)
        return x * jnp.sum(power)

    flat = flatten_model(model, STACK["w"][0], X)
    assert "optimization_barrier" not in primitives(flat)
    assert roles(flat, "dot_general")[:2] == [[Role.PARAMETER]] * 2


def test_data_enters_through_another_state():
    """It may take several iterations; states that start alike start as one value."""

    def model(p, x):
        def step(carry, _):
            a, b, c = carry
            return (x @ p, a, b), c

        zeros = jnp.zeros((x.shape[0], 3))
        return jnp.swapaxes(jax.lax.scan(step, (zeros,) * 3, length=4)[1], 0, 1)

    flat = check(model, STACK["w"][0], X)
    assert roles(flat, "optimization_barrier") == [[Role.PASSIVE]]
    assert flat.roles[flat.outputs[0]] is Role.ACTIVE


def test_barriers_of_parameters_and_data():
    """Only of a constant does a barrier make data."""

    def model(p, x):
        p, x, one = (jax.lax.optimization_barrier(v) for v in (p, x, jnp.ones(3)))
        return x @ p + one

    flat = check(model, STACK["w"][0], X)
    found = {v.aval.shape: flat.roles[v] for e in called(flat, "optimization_barrier")
             for v in e.outvars}  # fmt: skip
    assert found == {(3, 3): Role.PARAMETER, (1, 3): Role.PASSIVE, (3,): Role.PASSIVE}


# Functions with a rule for their backward pass.


@jax.custom_vjp
def relu(x):
    return jnp.maximum(x, 0.0)


relu.defvjp(lambda x: (relu(x), x), lambda x, g: (jnp.where(x > 0, g, 0.0),))


@jax.custom_vjp
def softplus(x):
    return jnp.log1p(jnp.exp(x))


softplus.defvjp(lambda x: (softplus(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def two_outputs(x, y, factor):
    return factor * x * y, jnp.sin(y), jnp.int32(3)


def _two_forward(x, y, factor):
    return two_outputs(x, y, factor), (x, y)


def _two_backward(factor, xy, g):
    x, y = xy
    return factor * g[0] * y, factor * g[0] * x + g[1] * jnp.cos(y)


two_outputs.defvjp(_two_forward, _two_backward)


@jax.custom_vjp
def power(x, count, key):
    return x**count + jax.random.normal(key, x.shape, x.dtype)


power.defvjp(
    lambda x, count, key: (power(x, count, key), (x, count)),
    lambda res, g: (g * res[1] * res[0] ** (res[1] - 1), None, None),
)


@jax.custom_vjp
def looped(x):
    return jax.lax.fori_loop(0, 2, lambda _, h: jnp.sin(h), x)


def _looped_backward(x, g):
    return (jax.lax.fori_loop(0, 2, lambda k, g: g * jnp.cos(jnp.where(k, x, jnp.sin(x))), g),)


looped.defvjp(lambda x: (looped(x), x), _looped_backward)


@jax.custom_vjp
def averaged(x):
    return jnp.broadcast_to(jnp.mean(x, -1, keepdims=True), x.shape)


averaged.defvjp(lambda x: (averaged(x), None), lambda _, g: (averaged(g),))

TABLE = normal(3, seed=7)


@jax.custom_vjp
def closing_over(x):
    return x * TABLE


closing_over.defvjp(lambda x: (closing_over(x), None), lambda _, g: (g * TABLE,))

KEY = np.array([0, 1], np.uint32)

# Each function, and one with the same derivatives that jax finds itself.
RULES = {
    "relu": (relu, lambda h: jnp.maximum(h, 0.0)),
    "softplus": (softplus, jax.nn.softplus),
    "twice": (
        lambda h: softplus(h * softplus(h)),
        lambda h: jax.nn.softplus(h * jax.nn.softplus(h)),
    ),
    "two_outputs": (
        lambda h: two_outputs(h, jnp.cos(h), 2.0)[:2],
        lambda h: (2 * h * jnp.cos(h), jnp.sin(jnp.cos(h))),
    ),
    "same_operand": (lambda h: two_outputs(h, h, 2.0)[0], lambda h: 2 * h**2),
    "one_output_used": (lambda h: two_outputs(h, h, 2.0)[1], jnp.sin),
    "integers": (
        lambda h: power(h, 3, KEY),
        lambda h: h**3 + jax.random.normal(KEY, h.shape, h.dtype),
    ),
    "constant_operand": (lambda h: two_outputs(jnp.ones_like(h), h, 2.0)[0], lambda h: 2 * h),
    "averaged": (
        averaged,
        lambda h: jnp.broadcast_to(jnp.mean(h, -1, keepdims=True), h.shape),
    ),
    "looped": (looped, lambda h: jnp.sin(jnp.sin(h))),
    "closing_over": (closing_over, lambda h: h * TABLE),
    "jit_remat": (jax.jit(jax.checkpoint(softplus)), jax.nn.softplus),
    "vmap": (jax.vmap(jax.vmap(softplus)), jax.nn.softplus),
    "scan": (
        lambda h: jax.lax.scan(lambda h, _: (softplus(h), None), h, length=2)[0],
        lambda h: jax.nn.softplus(jax.nn.softplus(h)),
    ),
}


def affine(function):
    return lambda p, x: function(x @ p["w"] + p["b"])


LAYER = {"w": normal(3, 3, seed=8), "b": normal(3, seed=9)}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_differentiated_backwards(name):
    """And their gradients likewise: most rules call the function itself."""
    function, reference = map(affine, RULES[name])
    if name == "integers":  # the same noise for every example, as the shapes are
        function, reference = jax.vmap(function, (None, 0)), jax.vmap(reference, (None, 0))
    flat = flatten_model(function, LAYER, X)
    assert flat.reverse_only

    def everything(model):
        outputs, pull = jax.vjp(model, LAYER)
        gradient = jax.grad(lambda p: sum(map(jnp.sum, jax.tree.leaves(jax.tree.map(
            jnp.sin, model(p))))))  # fmt: skip
        return outputs, pull(outputs), jax.vjp(gradient, LAYER)[1](LAYER)

    close(everything(lambda p: evaluated(flat, p, X)), everything(lambda p: reference(p, X)))


def test_rules_of_elementwise_functions():
    for function, expected in ((relu, True), (softplus, True), (looped, False), (averaged, False)):
        flat = flatten_model(affine(function), LAYER, X)
        (equation,) = called(flat, "custom_vjp_call")
        assert is_elementwise(equation, flat.roles) == expected


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.sin(x)


reversed_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (-3 * g * x,))


@jax.custom_vjp
def straight_through(x, scale):
    return jnp.round(x * scale)


straight_through.defvjp(
    lambda x, scale: (straight_through(x, scale), scale), lambda scale, g: (scale * g, None)
)


@pytest.mark.parametrize("function", [reversed_gradient, lambda h: straight_through(h, jnp.cos(h))])
def test_the_rule_is_the_derivative(function):
    """Whatever the function's own derivative were."""
    model = affine(function)
    flat = flatten_model(model, LAYER, X)
    outputs, push, pull = linear_pass(lambda p, x: evaluated(flat, p, x), LAYER, X)
    close(outputs, model(LAYER, X))
    expected = jax.vjp(lambda p: model(p, X), LAYER)[1](outputs)[0]
    close(pull(outputs), expected)
    direction = jax.tree.map(jnp.cos, LAYER)
    pairing = sum(map(jnp.vdot, jax.tree.leaves(expected), jax.tree.leaves(direction)))
    close(jnp.vdot(outputs, push(direction)), pairing)


def test_rules_of_parameters_and_of_data():
    """A rule on the way to a kernel counts; one that no derivative passes does not."""
    assert flatten_model(lambda p, x: x @ softplus(p), LAYER["w"], X).reverse_only
    assert not flatten_model(lambda p, x: softplus(x) @ p, LAYER["w"], X).reverse_only


NOT_LINEAR = {
    "clip": lambda g: jnp.clip(g, -1.0, 1.0),
    "norm": lambda g: g / jnp.maximum(1.0, jnp.linalg.norm(g)),
    "where": lambda g: jnp.where(jnp.abs(g) > 1.0, jnp.sign(g), g),
    "guided": lambda g: g * (g > 0).astype(g.dtype),
    "offset": lambda g: g + 1.0,
    "constant": jnp.ones_like,
    "padded": lambda g: jnp.pad(g, ((0, 0), (1, 0)), constant_values=1.0)[:, 1:],
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_backward_passes_that_are_no_transpose(name):
    """Nothing forwards corresponds to them; to drop them silently would change the gradient."""

    @jax.custom_vjp
    def strange(x):
        return x * 1.0

    strange.defvjp(lambda x: (x, None), lambda _, g: (NOT_LINEAR[name](g),))
    with pytest.raises(ModelError, match=r"custom_vjp function .*strange.* is not linear"):
        flatten_model(affine(strange), LAYER, X)


LINEAR = {
    "zero": jnp.zeros_like,
    "none": lambda g: None,
    "masked": lambda g: jnp.where(jnp.arange(g.size) > 1, g.reshape(-1), 0.0).reshape(g.shape),
    "updated": lambda g: jnp.zeros_like(g).at[..., 0].set(g[..., 1]),
    "concatenated": lambda g: jnp.concatenate([jnp.zeros_like(g[..., :1]), g[..., 1:]], -1),
    "pad": lambda g: jnp.pad(g[..., 1:], ((0, 0), (1, 0))),
    "subtracted": lambda g: g - jnp.mean(g, -1, keepdims=True),
    "solved": lambda g: jnp.linalg.solve(2 * jnp.eye(3), g.T).T,
}


@pytest.mark.parametrize("name", LINEAR)
def test_backward_passes_that_are_linear(name):
    """Zeros that they fill up with are nothing added."""

    @jax.custom_vjp
    def function(x):
        return x * 1.0

    function.defvjp(lambda x: (x, None), lambda _, g: (LINEAR[name](g),))
    flat = flatten_model(affine(function), LAYER, X)
    outputs, pull = jax.vjp(lambda p: evaluated(flat, p, X), LAYER)
    close(pull(outputs), jax.vjp(lambda p: jax.vmap(
        lambda x: affine(function)(p, x[None])[0])(X), LAYER)[1](outputs))  # fmt: skip


def test_curvature_with_a_rule():
    """All the way: the factors are those of the same function without one."""
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    batch = X, jnp.array([0, 1, 2, 0])
    params = {"first": LAYER, "out": {"w": normal(3, 3, seed=10), "b": normal(3)}}

    def network(activation):
        def model(p, x):
            h = activation(x @ p["first"]["w"] + p["first"]["b"])
            return h @ p["out"]["w"] + p["out"]["b"]

        objective = kfgn.Objective(model, loss)
        value, curvature = kfgn.value_grad_and_curvature(objective)(params, batch)
        return value, curvature.factors, kfgn.hessian(objective).diagonal(params, batch)

    close(network(softplus), network(jax.nn.softplus))


def test_outputs_are_what_the_model_returns():
    """Variables or literals; every variable has a role."""
    flat = flatten_model(*LOOPS["nested"])
    assert all(v in flat.roles for v in variables(flat.outputs))
