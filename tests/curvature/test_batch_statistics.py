"""Batch normalization in training, and what a model returns beside its outputs.

Truth is the user's own function of the whole batch, differentiated by jax.
"""

from __future__ import annotations

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfgn
from kfgn.base.errors import ModelError

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.usefixtures("x64")]

COUNT = 6
KINDS = {"dtype": jnp.float64, "param_dtype": jnp.float64}
METHODS = ("kfra", "kflr", "kfac", "empirical")
loss = kfgn.losses.softmax_cross_entropy_with_integer_labels


def data():
    """A batch, made where a test asks for float64."""
    x = jax.random.normal(jax.random.key(0), (COUNT, 4), jnp.float64)
    return x, jnp.arange(COUNT) % 3


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        # Means over the batch in another order; nnx keeps its averages in float32.
        tolerance = 1e-10 if jnp.result_type(a) == jnp.float64 else 1e-5
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def mean_loss(outputs, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1))


# Each framework's training mode: (params, model for kfgn, the user's own batch function), both
# of which return the new running averages.


class Linen(nn.Module):
    axis: str | None

    @nn.compact
    def __call__(self, x):
        for width in (5, 3):
            x = nn.Dense(width, **KINDS)(x)
            norm = nn.BatchNorm(use_running_average=False, axis_name=self.axis, **KINDS)
            x = nn.tanh(norm(x))
        return nn.Dense(3, **KINDS)(x)


def linen():
    state = Linen(None).init(jax.random.key(1), data()[0])
    params, averages = state["params"], state["batch_stats"]

    def model(axis):
        def apply(params, x):
            variables = {"params": params, "batch_stats": averages}
            return Linen(axis).apply(variables, x, mutable=["batch_stats"])

        return apply

    return params, model("batch"), model(None)


class Nnx(nnx.Module):
    def __init__(self, axis, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, axis_name=axis, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.norm(self.first(x.astype(jnp.float32)))))


def of_nnx():
    def split(axis):
        return nnx.split(Nnx(axis, nnx.Rngs(0)), nnx.Param, ...)

    def model(axis):
        graphdef, _, rest = split(axis)

        def apply(params, x):
            module = nnx.merge(graphdef, params, rest, copy=True)
            outputs = module(x)
            return outputs, nnx.state(module, nnx.BatchStat)

        return apply

    return split(None)[1], model("batch"), model(None)


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(4, 5, key=key)
        self.norm = eqx.nn.BatchNorm(5, "batch", mode="batch")
        self.out = eqx.nn.Linear(5, 3, key=key)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.out(jnp.tanh(x)), state


def equinox():
    module, state = eqx.nn.make_with_state(Equinox)(jax.random.key(1))
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def model(params, x):  # on a batch of one, under the axis
        # A state may be used once: the model, which is called several times, copies it.
        outputs, new = eqx.combine(params, static)(x[0], jax.tree.map(jnp.asarray, state))
        return outputs[None], new

    def own(params, x):
        net = eqx.combine(params, static)
        return jax.vmap(net, (0, None), (0, None), axis_name="batch")(
            x, jax.tree.map(jnp.asarray, state)
        )

    return params, model, own


FRAMEWORKS = {"linen": linen, "nnx": of_nnx, "equinox": equinox}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_batch_norm_in_training(name):
    """Value, gradient, averages and displaced objective are those of the user's function."""
    params, model, own = FRAMEWORKS[name]()
    x, labels = data()
    objective = kfgn.Objective(model, loss, axis_name="batch", has_aux=True, l2=0.1)
    method = METHODS[list(FRAMEWORKS).index(name)]
    curvature_fn = kfgn.value_grad_and_curvature(objective, method, model_examples=3)
    key = {"key": jax.random.key(2)} if method == "kfac" else {}

    def truth(params):
        outputs, aux = own(params, x)
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        return mean_loss(outputs, labels) + 0.05 * squares, aux

    @jax.jit
    def all_of(params):
        first, curvature = curvature_fn(params, (x, labels), **key)
        return (
            first,
            curvature.displaced(curvature.gradient),
            jax.value_and_grad(truth, has_aux=True)(params),
        )

    (value, grads), displaced, expected = all_of(params)
    close((value, grads), expected)
    moved = jax.tree.map(jnp.add, params, grads)
    at = jax.jit(lambda params: (truth(params)[0], objective(params, (x, labels))))
    close(displaced, at(moved)[0])
    close(*at(params))


def normalized(p, x, mean, square):
    """Both statistics of a layer are given."""
    return (x @ p - mean) * jax.lax.rsqrt(square - mean**2 + 1e-2)


def with_axis(p, x):
    h = x
    for kernel in p[:-1]:
        h = h @ kernel
        mean, square = (jax.lax.pmean(jnp.mean(s, 0), "batch") for s in (h, h**2))
        h = jnp.tanh((h - mean) * jax.lax.rsqrt(square - mean**2 + 1e-2))
    return h @ p[-1]


def with_data(p, inputs):
    """The same, with statistics as data."""
    h, *statistics = inputs
    for kernel, mean, square in zip(p[:-1], statistics[::2], statistics[1::2], strict=True):
        h = jnp.tanh(normalized(kernel, h, mean, square))
    return h @ p[-1]


def own_batch(p, x):
    """The user's function of the batch, and its statistics, a row per example."""
    h, found = x, []
    for kernel in p[:-1]:
        a = h @ kernel
        found += [jnp.mean(a, 0), jnp.mean(a**2, 0)]
        h = jnp.tanh(normalized(kernel, h, *found[-2:]))
    return h @ p[-1], [jnp.broadcast_to(s, (COUNT, *s.shape)) for s in found]


def layers():
    keys = jax.random.split(jax.random.key(3), 3)
    sizes = (4, 5, 4, 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, itertools.pairwise(sizes), strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_curvature_has_statistics_as_data(method):
    """Factors, quadratic model and diagonals are those of a model that gets them as inputs."""
    p, (x, labels) = layers(), data()
    statistics = own_batch(p, x)[1]
    options = {"model_examples": 3, "unassigned": "diagonal"}
    key = {"key": jax.random.key(2)} if method == "kfac" else {}
    found, expected = (
        jax.jit(
            lambda objective, batch: kfgn.value_grad_and_curvature(objective, method, **options)(
                p, batch, **key
            )[1],
            static_argnums=0,
        )(objective, batch)
        for objective, batch in (
            (kfgn.Objective(with_axis, loss, axis_name="batch"), (x, labels)),
            (kfgn.Objective(with_data, loss), ((x, *statistics), labels)),
        )
    )
    close(found.factors, expected.factors)
    direction = {str(k): jnp.ones_like(a) for k, a in enumerate(p)}
    pushed, wanted = found.linearized(direction), expected.linearized(direction)
    close(pushed, wanted)
    close(found.output_product(pushed, pushed), expected.output_product(wanted, wanted))
    grads = jax.grad(lambda p: mean_loss(own_batch(p, x)[0], labels))(p)
    close(list(found.gradient.values()), grads)


def test_operators():
    """All verbs are of one matrix, the one with statistics as constants."""
    p, (x, labels) = layers(), data()
    statistics, batch = own_batch(p, x)[1], (x, labels)
    objective = kfgn.Objective(with_axis, loss, axis_name="batch")

    flat, back = jax.flatten_util.ravel_pytree(p)
    size = p[0].size

    @jax.jit
    def by_jax(flat):
        def fixed(v):
            return with_data(back(v), (x, *statistics))

        rows, probabilities = jax.jacobian(fixed)(flat), jax.nn.softmax(fixed(flat))
        output = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(probabilities)
        gradients = jnp.einsum("nkp,nk->np", rows, probabilities - jax.nn.one_hot(labels, 3))
        dense = jnp.einsum("nkp,nkl,nlq->pq", rows, output, rows) / COUNT
        hessian = jax.hessian(lambda v: mean_loss(fixed(v), labels))(flat)
        return rows, dense, hessian, gradients.T @ gradients / COUNT

    @jax.jit
    def ours(p, batch):
        found = []
        for operator in (kfgn.gauss_newton, kfgn.hessian):
            of, ones = operator(objective), jnp.ones_like(p[0])
            found.append((
                of.dense(p, batch),
                of.matvec(p, batch, p),
                of.matvec(p, batch, p, chunk_size=4),
                of.blocks(p, batch)["0"],
                of.diagonal(p, batch)["0"].reshape(-1),
                of.block_matvecs(p, batch)["0"](ones).reshape(-1),
            ))  # fmt: skip
        fisher = kfgn.empirical_fisher(objective)
        return (
            found,
            kfgn.gauss_newton(objective).jacobian(p, batch),
            (fisher.dense(p, batch), list(fisher.diagonal(p, batch).values())),
            kfgn.diagnostics.negative_curvature(objective, of="block")(p, batch)["0"].least,
        )

    rows, dense, hessian, fisher = map(np.asarray, by_jax(flat))
    found, jacobian, (empirical, diagonal), least = ours(p, batch)
    for one, expected in zip(found, (dense, hessian), strict=True):
        product, block = back(jnp.asarray(expected @ flat)), expected[:size, :size]
        close(one, (expected, product, product, block, np.diag(block), block.sum(1)))
    close(jacobian, rows)
    close(empirical, fisher)
    close(np.concatenate([np.ravel(d) for d in diagonal]), np.diag(fisher))
    close(least, np.linalg.eigvalsh(hessian[:size, :size])[0])


def test_distance_from_the_exact_matrix():
    """The figures of `flatten.named_axis`; behind the statistics there is no difference."""
    keys = jax.random.split(jax.random.key(0), 4)
    p = {
        "a": 0.5 * jax.random.normal(keys[0], (4, 6)),
        "b": 0.5 * jax.random.normal(keys[1], (6, 3)),
        "scale": jnp.ones(6),
        "shift": jnp.zeros(6),
    }

    def model(p, x, mean=lambda h: jax.lax.pmean(jnp.mean(h, 0), "batch")):
        h = x @ p["a"]
        h = (h - mean(h)) * jax.lax.rsqrt(mean(h**2) - mean(h) ** 2 + 1e-5)
        return jnp.tanh(h * p["scale"] + p["shift"]) @ p["b"]

    for count, figure in ((32, 0.29), (256, 0.24)):
        x = jax.random.normal(keys[2], (count, 4))
        batch = x, jnp.arange(count) % 3
        operator = kfgn.gauss_newton(kfgn.Objective(model, loss, axis_name="batch"))

        def own(p, x):
            return model(p, x, lambda h: jnp.mean(h, 0))

        @jax.jit
        def by_jax(p, x):
            count = len(x)
            rows = [j.reshape(count, 3, -1) for j in jax.tree.leaves(jax.jacobian(own)(p, x))]
            rows, q = jnp.concatenate(rows, -1), jax.nn.softmax(own(p, x))
            output = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(q)
            return jnp.einsum("nkp,nkl,nlq->pq", rows, output, rows) / count

        found, exact = np.asarray(jax.jit(operator.dense)(p, batch)), np.asarray(by_jax(p, x))
        distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert abs(distance - figure) < 0.01
        close(found[24:, 24:], exact[24:, 24:])


COLLECTIVES = {
    "pmean": lambda h: h - jax.lax.pmean(h, "batch"),
    "psum": lambda h: h / (1 + jax.lax.psum(h**2, "batch")),
    "pmax": lambda h: h - jax.lax.pmax(jax.lax.stop_gradient(h), "batch"),
    "all_gather": lambda h: h - jnp.std(jax.lax.all_gather(h, "batch"), axis=0),
    "size": lambda h: h / jax.lax.axis_size("batch") + jax.lax.psum(1, "batch"),
    "index": lambda h: h * (1 + jax.lax.axis_index("batch").astype(h.dtype)),
    "nested": jax.jit(lambda h: jax.checkpoint(lambda h: h - jax.lax.pmean(h, "batch"))(h)),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives(name):
    """Of each example alone, under the axis."""

    def one(p, x):
        return jnp.tanh(COLLECTIVES[name](x @ p[0])) @ p[1]

    def truth(p):
        return mean_loss(jax.vmap(one, (None, 0), axis_name="batch")(p, x), labels)

    p, (x, labels) = [layers()[0], layers()[2].T @ jnp.ones((4, 3))], data()
    p[1] = jnp.linspace(-1, 1, 15).reshape(5, 3)
    objective = kfgn.Objective(lambda p, x: one(p, x[0])[None], loss, axis_name="batch")
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfra")
    found, expected = jax.jit(
        lambda p: (curvature_fn(p, (x, labels))[0], jax.value_and_grad(truth)(p))
    )(p)
    close(found, expected)


# Aux without an axis.


def outputs_and_aux(p, x):
    h = jnp.tanh(x @ p[0])
    return h @ p[1], {
        "hidden": h,
        "second": jnp.stack([h, 2 * h]),  # the batch is its axis 1
        "labels": jnp.argmax(h, 1),
        "mean": jnp.mean(h),
        "norm": jnp.sum(p[0] ** 2),
        "count": jnp.asarray(len(x)),
        "pairs": h @ h.T,
    }


def test_aux():
    """All as the user's own function returns it, whatever it depends on."""
    p, (x, labels) = [layers()[0], jnp.linspace(-1, 1, 15).reshape(5, 3)], data()
    variants = {
        "each": outputs_and_aux,
        "coupled": lambda p, x: (x @ p[0] @ p[1], x - jnp.mean(x, axis=0)),
        "none": lambda p, x: (x @ p[0] @ p[1], ()),
    }
    for model in variants.values():
        objective = kfgn.Objective(model, loss, has_aux=True)

        def both(p, model=model, objective=objective):
            def truth(p):
                outputs, aux = model(p, x)
                return mean_loss(outputs, labels), aux

            found = kfgn.value_grad_and_curvature(objective, "kflr")(p, (x, labels))[0]
            return found, jax.value_and_grad(truth, has_aux=True)(p)

        close(*jax.jit(both)(p))


def test_aux_costs_no_second_pass():
    """What one example tells is of the same forward pass; so is a gradient through statistics."""

    def flops(model, **options):
        objective = kfgn.Objective(model, loss, **options)
        function = kfgn.value_grad_and_curvature(objective, "empirical")
        compiled = jax.jit(lambda p: function(p, data())[0]).lower(p).compile()
        return compiled.cost_analysis()["flops"]

    p = [layers()[0], jnp.linspace(-1, 1, 15).reshape(5, 3)]
    alone = flops(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])

    def hidden(p, x):
        h = jnp.tanh(x @ p[0])
        return h @ p[1], h

    assert flops(hidden, has_aux=True) == alone


# Refusals, whose remedies are above.


def test_refusals():
    x, labels = data()
    params, model, own = linen()

    def outputs(function):
        return lambda p, x: function(p, x)[0]

    def refused(words, model, **options):
        objective = kfgn.Objective(model, loss, **options)
        with pytest.raises(ModelError, match=words):
            kfgn.value_grad_and_curvature(objective)(params, (x, labels))

    refused(r'Objective\(model, loss, axis_name="batch"\)', outputs(own))
    refused("every normalization needs that axis_name", outputs(own), axis_name="batch")

    def mapped(p, x):
        return jax.vmap(lambda x: model(p, x[None])[0][0], axis_name="batch")(x)

    refused(r"no jax\.vmap of that name", mapped, axis_name="batch")
    refused(r"must return a pair \(outputs, aux\)", outputs(own), has_aux=True)

    @jax.custom_jvp
    def hidden(h):
        return h - jax.lax.pmean(h, "batch")

    hidden.defjvps(lambda g, _, h: g)
    kernel = params["Dense_0"]["kernel"]
    with pytest.raises(ModelError, match="inside of a 'custom_jvp_call'"):
        objective = kfgn.Objective(lambda p, x: hidden(x @ p), loss, axis_name="batch")
        kfgn.value_grad_and_curvature(objective)(kernel, (x, labels))
    graphdef, params, rest = nnx.split(Nnx("batch", nnx.Rngs(0)), nnx.Param, ...)

    def stale(p, x):
        return nnx.merge(graphdef, p, rest)(x)

    refused(r"TraceContextError(.|\n)*copy=True", stale, axis_name="batch")


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=False, axis_name="batch", **KINDS)
        h = nn.Dropout(0.5, deterministic=False)(nn.tanh(norm(nn.Dense(5, **KINDS)(x))))
        return nn.Dense(3, **KINDS)(h)


def test_dropout_beside_batch_norm():
    """Under the axis every example has a key of its own; one for all is refused."""
    (x, labels), keys = data(), jax.random.split(jax.random.key(3), COUNT)
    state = Dropped().init({"params": jax.random.key(1), "dropout": keys[0]}, x)

    def model(p, inputs):
        variables = {"params": p, "batch_stats": state["batch_stats"]}
        x, key = inputs
        rngs = {"dropout": key[0]}
        return Dropped().apply(variables, x, mutable=["batch_stats"], rngs=rngs)[0]

    def truth(p):
        one = jax.vmap(lambda *example: model(p, [a[None] for a in example])[0], axis_name="batch")
        return mean_loss(one(x, keys), labels)

    objective = kfgn.Objective(model, loss, axis_name="batch")
    first, _ = kfgn.value_grad_and_curvature(objective, "kflr")(
        state["params"], ((x, keys), labels)
    )
    close(first, jax.value_and_grad(truth)(state["params"]))
    closed = kfgn.Objective(lambda p, x: model(p, (x, keys)), loss, axis_name="batch")
    with pytest.raises(ModelError, match="one key that it closes over"):
        kfgn.value_grad_and_curvature(closed)(state["params"], (x, labels))


def test_training():
    """A classifier with two normalizations trains; its steps measure their own objective."""
    params, model, own = linen()
    x, labels = batch = data()
    objective = kfgn.Objective(model, loss, axis_name="batch", has_aux=True)
    optimizer = kfgn.kflr(objective, params, batch)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr")

    @jax.jit
    def step(params, state):
        ((_, averages), grads), curvature = curvature_fn(params, batch)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state, averages

    state, start = optimizer.init(params), objective(params, batch)
    for _ in range(10):
        params, state, averages = step(params, state)
    assert mean_loss(own(params, x)[0], labels) < 0.6 * start
    assert jax.tree.leaves(averages)[0].shape == (5,)
