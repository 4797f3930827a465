"""Noise, masks and positions that a model makes for its whole batch: jax.grad is the truth."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.base.errors import ModelError
from kfgn.model.trial.carried import carry

pytestmark = [pytest.mark.loose_dtypes, pytest.mark.usefixtures("x64")]

loss = kfgn.losses.half_squared_error
COUNT = 5


def setting():
    x, y, a, mean, spread, b = (
        jax.random.normal(key, shape, jnp.float64)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 6),
            ((COUNT, 4), (COUNT, 3), (4, 6), (6, 2), (6, 2), (2, 3)),
            strict=True,
        )
    )
    return {"a": a, "mean": mean, "spread": 0.1 * spread, "b": b}, (x, y)


def autoencoder(key):
    """The textbook's: one key for all noise of the batch."""

    def model(p, x):
        h = jnp.tanh(x @ p["a"])
        mean, spread = h @ p["mean"], h @ p["spread"]
        z = mean + jnp.exp(spread) * jax.random.normal(key, mean.shape)
        return z @ p["b"]

    return model


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=False)(nn.tanh(x))
            x = nn.Dense(4, param_dtype=jnp.float64)(x)
        return nn.Dense(3, param_dtype=jnp.float64)(x)


def dropout(key):
    return lambda p, x: Net().apply(p, x, rngs={"dropout": key})


def with_aux(key):
    def model(p, x):
        mask = jax.random.bernoulli(key, 0.5, (2, len(x), 6))  # the batch is its axis 1
        h = jnp.tanh(x @ p["a"]) * mask[0] + mask[1]
        return h @ p["mean"] @ p["b"], {"hidden": h, "mean": jnp.mean(h)}

    return model


def positions(key):
    def model(p, x):
        share = jnp.arange(len(x), dtype=x.dtype) / jnp.sum(jnp.ones(len(x)))
        return jnp.tanh(x @ p["a"] + share[:, None]) @ p["mean"] @ p["b"]

    return model


def layer(p, h):
    return jnp.tanh(h @ p["mean"] @ p["mean"].T)


def before_a_loop(key):
    def model(p, x):
        def step(h, noise):
            return layer(p, h) + noise, None

        noise = jax.random.normal(key, (2, len(x), 6))
        return jax.lax.scan(step, x @ p["a"], noise)[0][:, :3]

    return model


def in_a_loop(key):
    """Noise that is a process of its own, from a key that the loop carries, and a mask's count."""

    def model(p, x):
        def step(state, scale):
            h, key, noise, count = state
            key, own = jax.random.split(key)
            noise = 0.9 * noise + jax.random.normal(own, h.shape)
            row = jnp.arange(len(x))[:, None]  # the same in all iterations
            h = layer(p, h) * scale + noise + row + count
            return (h, key, noise, count + 1), noise * h

        start = x @ p["a"], key, jnp.zeros((len(x), 6)), 0
        (h, _, noise, _), rows = jax.lax.scan(step, start, jnp.arange(1.0, 4.0), reverse=True)
        return (h + noise + rows.sum(0))[:, :3]

    return model


def in_loops(key):
    """In one loop inside of another, one with branches, and one that is rematerialized."""

    def model(p, x):
        def inner(h, key):
            mask = jax.random.bernoulli(key, 0.7, h.shape)
            return jax.lax.cond(mask[0, 0], lambda h: layer(p, h) * mask, lambda h: h, h), None

        @jax.checkpoint
        def outer(h, key):
            first, second, fixed = jax.random.split(key, 3)
            h = jax.lax.scan(inner, h, jax.random.split(first, 2))[0]
            h = h * jax.random.bernoulli(fixed, 0.8, h.shape)
            return h + jax.random.gumbel(second, h.shape), None

        def numbered(k, h):
            return layer(p, h) * k + jax.random.normal(jax.random.fold_in(key, k), h.shape)

        h = jax.lax.scan(outer, x @ p["a"], jax.random.split(key, 3))[0]
        return jax.lax.fori_loop(0, 3, numbered, h)[:, :3]

    return model


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(param_dtype=jnp.float64)(x)
        y = nn.Dense(4, param_dtype=jnp.float64)(nn.gelu(y))
        return x + nn.Dropout(0.3, deterministic=False)(y), None


class Deep(nn.Module):
    """Layers in a loop, as flax makes it."""

    @nn.compact
    def __call__(self, x):
        keys = {"params": True, "dropout": True}
        scanned = nn.scan(nn.remat(Block), {"params": 0}, split_rngs=keys, length=3)
        return nn.Dense(3, param_dtype=jnp.float64)(scanned()(x, None)[0])


def deep(key):
    return lambda p, x: Deep().apply(p, x, rngs={"dropout": key})


MODELS = {
    "autoencoder": autoencoder,
    "dropout": dropout,
    "aux": with_aux,
    "positions": positions,
    "before a loop": before_a_loop,
    "in a loop": in_a_loop,
    "in loops": in_loops,
    "deep": deep,
}


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)  # sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_of_the_users_function(name):
    """Value, gradient, quadratic model and exact products, with a key that is traced."""
    params, (x, y) = setting()
    if name in ("dropout", "deep"):
        keys = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
        params = (Net if name == "dropout" else Deep)().init(keys, x)
    elif name != "autoencoder":
        del params["spread"]
        if "loop" in name:
            del params["b"]
    has_aux = name == "aux"

    @jax.jit
    def both(params, key):
        model = MODELS[name](key)
        objective = kfgn.Objective(model, loss, has_aux=has_aux)
        curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr", model_examples=None)
        first, curvature = curvature_fn(params, (x, y))
        linear = curvature.linearized(curvature.gradient)
        product = kfgn.gauss_newton(objective).matvec(params, (x, y), first[1])

        def truth(params):
            outputs = model(params, x)
            outputs, aux = outputs if has_aux else (outputs, ())
            value = jnp.mean(0.5 * jnp.sum((outputs - y) ** 2, 1))
            return (value, aux) if has_aux else value

        def outputs(params):
            found = model(params, x)
            return found[0] if has_aux else found

        expected = jax.value_and_grad(truth, has_aux=has_aux)(params)
        moved, pull = jax.vjp(lambda v: jax.jvp(outputs, (params,), (v,))[1], expected[1])
        wanted = expected, moved, jax.tree.map(lambda g: g / COUNT, pull(moved)[0])
        return (first, linear, product), wanted

    close(*both(params, jax.random.key(7)))


def test_creation_and_factors():
    """Whether its key is traced or not, and with shapes alone, a model is read alike."""
    params, batch = setting()
    objective = kfgn.Objective(autoencoder(jax.random.key(7)), loss)
    blocks = kfgn.layers.find_blocks(objective, params, jax.eval_shape(lambda: batch))
    assert sorted(blocks.layers) == ["a", "b", "mean", "spread"]
    eager = kfgn.value_grad_and_curvature(objective, "kfra")(params, batch)[1]

    @jax.jit
    def jitted(key):
        objective = kfgn.Objective(autoencoder(key), loss)
        return kfgn.value_grad_and_curvature(objective, "kfra")(params, batch)[1].factors

    close(jitted(jax.random.key(7)), eager.factors)


def test_loops_stay_loops():
    """Noise inside of them is no reason to unroll: the layers of all iterations are one."""
    _, (x, _) = setting()
    params = Deep().init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)
    objective = kfgn.Objective(deep(jax.random.key(7)), loss)
    batch = x, jnp.ones((COUNT, 3))
    (_, grads), curvature = kfgn.value_grad_and_curvature(objective, "kflr")(params, batch)
    close(grads, jax.grad(objective)(params, batch))
    factors = curvature.factors["params/ScanCheckpointBlock_0/Dense_0"]
    assert factors.activation.shape == (3, 5, 5)
    assert factors.pre_activation.shape == (3, 4, 4)


def until_it_ends(p, x):
    """A loop that jax does not differentiate."""

    def step(state):
        return state[0] + 1, jax.random.normal(jax.random.key(state[0]), x.shape)

    return (x + jax.lax.while_loop(lambda s: s[0] < 3, step, (0, 0.0 * x))[1]) @ p["a"]


def shuffled(p, x):
    """Mixes a batch's rows; with this key three of them stay where they are."""
    key = jax.random.key(9)
    return (0.7 * x + 0.3 * x[jax.random.permutation(key, len(x))]) @ p["a"]


REFUSED = {
    "shuffled": shuffled,
    "size": lambda p, x: x @ p["a"] / x.shape[0],
    "loop": until_it_ends,
    "coupled": lambda p, x: positions(None)(p, x - jnp.mean(x, 0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried(name):
    """It stays an error."""
    params, (x, _) = setting()
    remedy = "it is enough to draw before it" if name == "loop" else r"independent|alone"
    with pytest.raises(ModelError, match=remedy):
        carry(kfgn.Objective(REFUSED[name], loss), params, x)
