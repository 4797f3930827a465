"""Weighted batches: the truth is of the user's own weighted function, and of smaller batches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfgn

LOSS = kfgn.losses.softmax_cross_entropy_with_integer_labels
METHODS = ("kfra", "kflr", "kfac", "empirical")
L2 = 0.1

pytestmark = pytest.mark.usefixtures("x64")


def model(params, x):
    """Dense layers, a look-up, an elementwise node and one that is not, a skip connection."""
    h = jnp.tanh(x["rows"] @ params["a"]["w"] + params["a"]["b"]) + params["table"][x["index"]]
    h = h + h / jnp.sqrt(1.0 + jnp.sum(jnp.square(h), axis=-1, keepdims=True))
    return h @ params["c"]["w"] + params["c"]["b"]


def problem(count=6):
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "a": {"w": jax.random.normal(keys[0], (4, 3)), "b": jnp.ones(3)},
        "c": {"w": jax.random.normal(keys[1], (3, 3)), "b": jnp.zeros(3)},
        "table": jax.random.normal(keys[2], (5, 3)),
    }
    rows = jax.random.normal(keys[3], (count, 4))
    inputs = {"rows": rows, "index": jnp.arange(count) % 5}
    return params, inputs, jax.random.randint(keys[4], (count,), 0, 3)


@jax.jit
def truth(params, inputs, labels, weights, over):
    """The user's own weighted mean, and the penalty."""
    losses = jax.vmap(LOSS)(model(params, inputs), labels)
    return jnp.sum(weights * losses) / over + L2 / 2 * optax.tree.norm(params, squared=True)


true_gradient = jax.jit(jax.value_and_grad(truth))


def close(found, expected, rtol=1e-12, atol=1e-13):
    """Sums of some terms in another order: roundoff."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


def wave(function, tree):
    """A direction that depends on shapes alone."""
    return jax.tree.map(lambda x: function(jnp.arange(x.size * 1.0)).reshape(x.shape), tree)


def seen(objective, method, batch, params, **options):
    """All that an update reads of a batch."""
    return _run(objective, method, **options)(params, batch)


@functools.cache
def _run(objective, method, **options):
    function = kfgn.value_grad_and_curvature(objective, method, **options)
    key = {"key": jax.random.key(3)} if method == "kfac" else {}

    @jax.jit
    def run(params, batch):
        (value, grads), curvature = function(params, batch, **key)
        u, v = (wave(f, curvature.gradient) for f in (jnp.cos, jnp.sin))
        forms = curvature.output_product(curvature.linearized(u), curvature.linearized(v))
        return value, grads, curvature.factors, forms, curvature.displaced(u), curvature.examples

    return run


def part(tree, index):
    return jax.tree.map(lambda a: a[index], tree)


@pytest.mark.parametrize("method", METHODS)
def test_weight_zero_is_absent(method):
    """Whatever stands there; and the value is the user's own."""
    params, inputs, labels = problem()
    weights = jnp.array([1.0, 0.5, 2.0, 1.5, 0.0, 0.0])
    padded = {"rows": inputs["rows"].at[4:].set(jnp.nan), "index": inputs["index"].at[4].set(-7)}
    wrong = labels.at[4:].set(-1)
    objective = kfgn.Objective(model, LOSS, l2=L2)
    # A mask of bools is one of numbers before any method sees it.
    masked = ((weights > 0, 4.0),) if method == "kflr" else ()
    for given, sum_of in ((weights, 5.0), *masked):
        found = seen(objective, method, (padded, wrong, given), params)
        small = (part(inputs, slice(4)), labels[:4], given[:4])
        close(found, seen(objective, method, small, params))
        expected = true_gradient(params, inputs, labels, given.astype(float), sum_of)
        close(found[:2], expected)
        assert found[-1] == sum_of
    if masked:
        close(found, seen(objective, method, small[:2], params))


@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
@pytest.mark.parametrize("over", ["weights", "examples"])
def test_weight_two_is_twice(method, over):
    """Also where Jacobians differ between examples, which the mean matrix averages over."""
    params, inputs, labels = problem()
    times = jnp.array([2, 1, 3, 1, 0, 1])
    repeated = jnp.repeat(jnp.arange(6), times, total_repeat_length=8)
    objective = kfgn.Objective(model, LOSS, l2=L2, mean_over=over)
    found = seen(objective, method, (inputs, labels, times), params)
    twice = kfgn.Objective(model, LOSS, l2=L2)
    value, _, factors, form, *_ = seen(
        twice, method, (part(inputs, repeated), labels[repeated]), params
    )
    scale = 1.0 if over == "weights" else 8 / 6
    close(found[0], truth(params, inputs, labels, times.astype(float), 8 / scale))
    close(found[0] - value, (scale - 1) * (value - truth(params, inputs, labels, jnp.zeros(6), 1)))
    scaled = {n: f._replace(pre_activation=scale * f.pre_activation) for n, f in factors.items()}
    close((found[2], found[3]), (scaled, scale * form))
    assert found[-1] == (8 if over == "weights" else 6)


@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
def test_routed_examples(method):
    """Experts count the weights of what is routed to them, also over an axis of devices."""
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "experts": jax.random.normal(keys[0], (2, 3, 3)),
        "out": jax.random.normal(keys[1], (3, 2)),
    }

    def routed(params, inputs):
        h = jnp.tanh(jnp.einsum("nti,ntio->nto", inputs["x"], params["experts"][inputs["index"]]))
        return jnp.sum(h, axis=1) @ params["out"]

    index = jnp.array([[0, 0], [0, 1], [1, 1], [0, 0], [0, 1], [0, 0]])
    inputs = {"x": jax.random.normal(keys[2], (6, 2, 3)), "index": index}
    targets = jax.random.normal(keys[3], (6, 2))
    objective = kfgn.Objective(routed, kfgn.losses.half_squared_error)
    times = jnp.array([2, 1, 3, 0, 2, 0])
    repeated = jnp.repeat(jnp.arange(6), times, total_repeat_length=8)
    found = seen(objective, method, (inputs, targets, times), params)
    twice = part((inputs, targets), repeated)
    close(found, seen(objective, method, twice, params))
    function = kfgn.value_grad_and_curvature(objective, method, axis_name="devices")
    halves = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), twice)

    @jax.jit
    def spread(halves):
        return jax.vmap(lambda b: function(params, b)[1].factors, axis_name="devices")(halves)

    close(part(spread(halves), 0), found[2])


@pytest.mark.parametrize("spatial", ["joint", "homogeneous"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_positions(spatial, sharing):
    """A convolution, whose kernel is applied at several positions."""
    keys = jax.random.split(jax.random.key(1), 4)
    params = {"k": jax.random.normal(keys[0], (3, 2, 4)), "w": jax.random.normal(keys[1], (16, 2))}

    def convolved(params, x):
        dims = ("NTC", "TIO", "NTC")
        h = jax.lax.conv_general_dilated(x, params["k"], (1,), "VALID", dimension_numbers=dims)
        return jnp.tanh(h).reshape(len(x), -1) @ params["w"]

    objective = kfgn.Objective(convolved, kfgn.losses.half_squared_error)
    x, y = jax.random.normal(keys[2], (4, 6, 2)), jax.random.normal(keys[3], (4, 2))
    index = jnp.array([0, 0, 1, 3])
    options = {"spatial": spatial, "sharing": sharing}
    found = seen(objective, "kfra", (x, y, jnp.array([2, 1, 0, 1])), params, **options)
    close(found, seen(objective, "kfra", (x[index], y[index]), params, **options))


@pytest.mark.parametrize("over", ["weights", "examples"])
def test_exact_matrices_take_signs(over):
    """All three, by all verbs, with weights of both signs."""
    params, inputs, labels = problem()
    weights = jnp.array([1.0, -0.5, 2.0, 0.0, -1.0, 0.5])
    objective = kfgn.Objective(model, LOSS, l2=L2, mean_over=over)
    size = 5.0 if over == "weights" else 6.0
    batch = (inputs, labels, weights)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def expected(flat):
        def losses(p):
            return jax.vmap(LOSS)(model(unravel(p), inputs), labels)

        outputs = model(unravel(flat), inputs)
        jacobian = jax.jacobian(lambda p: model(unravel(p), inputs))(flat)
        curved = jax.vmap(jax.hessian(LOSS))(outputs, labels)
        gauss_newton = jnp.einsum("n,nkp,nkl,nlq", weights, jacobian, curved, jacobian)
        gradients = jax.jacobian(losses)(flat)
        fisher = jnp.einsum("n,np,nq", weights, gradients, gradients)
        hessian = jax.hessian(lambda p: truth(unravel(p), inputs, labels, weights, size))(flat)
        return hessian - L2 * jnp.eye(flat.size), gauss_newton / size, fisher / size

    def by_verbs(operator, params, batch):
        vector = jax.tree.map(jnp.cos, params)
        return (
            operator.dense(params, batch),
            ravel_pytree(operator.matvec(params, batch, vector))[0],
            ravel_pytree(operator.matvec(params, batch, vector, chunk_size=4))[0],
            ravel_pytree(operator.diagonal_by_parameter(params, batch))[0],
            operator.blocks(params, batch)["table"],
            jnp.mean(operator.blocks(params, batch, per_example=True)["table"], axis=0),
        )

    vector = ravel_pytree(jax.tree.map(jnp.cos, params))[0]
    verbs = (kfgn.hessian, kfgn.gauss_newton, kfgn.empirical_fisher)
    for verb, matrix in zip(verbs, expected(flat), strict=True):
        found = jax.jit(functools.partial(by_verbs, verb(objective)))(params, batch)
        table = matrix[-15:, -15:]  # the last of the leaves
        diagonal = jnp.diag(matrix)
        close(found, (matrix, matrix @ vector, matrix @ vector, diagonal, table, table))


def test_what_must_be_semi_definite_has_sizes():
    """Factors and quadratic model have |w|; value and gradient the weights themselves."""
    params, inputs, labels = problem()
    weights = jnp.array([1.0, -0.5, 2.0, 0.0, -1.0, 0.5])
    objective = kfgn.Objective(model, LOSS, l2=L2)
    for method in ("kfra", "kflr", "empirical"):
        signed = seen(objective, method, (inputs, labels, weights), params)
        sizes = seen(objective, method, (inputs, labels, jnp.abs(weights)), params)
        close(signed[2:4], sizes[2:4])
        close(signed[:2], true_gradient(params, inputs, labels, weights, 5.0))


def test_model_examples_are_spread_over_what_counts():
    """As in the smaller batch, and with its mean of the weights."""
    params, inputs, labels = problem(9)
    weights = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0, 3.0, 0.0, 1.0, 1.0])
    kept = jnp.flatnonzero(weights)
    objective = kfgn.Objective(model, LOSS)
    for count in (2, 3, 8):
        found, small = (
            seen(objective, "kflr", (part(inputs, k), labels[k], weights[k]), params,
                 model_examples=count)[3]
            for k in (slice(None), kept)
        )  # fmt: skip
        close(found, small)


@pytest.mark.parametrize("method", ["kflr", "empirical"])
def test_average_of_weighted_parts_is_the_whole(method):
    params, inputs, labels = problem()
    weights = jnp.array([1.0, 0.5, 2.0, 0.0, 0.0, 0.25])
    objective = kfgn.Objective(model, LOSS, l2=L2)
    function = kfgn.value_grad_and_curvature(objective, method)

    @jax.jit
    def run(params, batch):
        whole = function(params, batch)[1]
        parts = [function(params, part(batch, slice(*e)))[1] for e in ((0, 3), (3, 5), (5, 6))]
        u = wave(jnp.cos, whole.gradient)
        return [
            (c.factors, c.value, c.gradient, c.examples, c.displaced(u),
             c.output_product(c.linearized(u), c.linearized(u)))
            for c in (whole, kfgn.average_curvature(parts))
        ]  # fmt: skip

    close(*run(params, (inputs, labels, weights)))


def test_batches_of_batches():
    params, inputs, labels = problem()
    weights = jnp.array([[1.0, 0.5, 2.0, 0.0, 0.0, 0.25], [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    objective = kfgn.Objective(model, LOSS)
    function = kfgn.value_grad_and_curvature(objective)

    def factors(weights):
        return function(params, (inputs, labels, weights))[1].factors

    found = jax.jit(jax.vmap(factors))(weights)
    close(found, jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(factors), weights)))


@pytest.mark.parametrize("method", ["kfra", "kflr"])
def test_parts_on_devices(method):
    """An axis of devices that have different sums of weights, and one that has few examples."""
    params, inputs, labels = problem()
    batch = (inputs, labels, jnp.array([1.0, 0.5, 2.0, 0.0, 0.0, 0.25]))
    objective = kfgn.Objective(model, LOSS, l2=L2)
    spread = kfgn.value_grad_and_curvature(objective, method, axis_name="device")

    def of_device(batch):
        (value, grads), curvature = spread(params, batch)
        u, v = (wave(f, curvature.gradient) for f in (jnp.cos, jnp.sin))
        forms = curvature.output_product(curvature.linearized(u), curvature.linearized(v))
        return value, grads, curvature.factors, forms, curvature.displaced(u), curvature.examples

    parts = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), batch)
    found = jax.jit(jax.vmap(of_device, axis_name="device"))(parts)
    whole = seen(objective, method, batch, params)
    close(found, jax.tree.map(lambda x: jnp.stack([x, x]), whole))
