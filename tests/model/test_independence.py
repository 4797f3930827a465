"""Models whose examples depend on each other are found, whatever is known of their inputs."""

from __future__ import annotations

import functools
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kfgn.base.errors import ModelError
from kfgn.model.trial import independence, separate
from kfgn.model.trial.independence import check_independent
from tests.tables.small import shapes

# The models compute in their own dtypes.
pytestmark = pytest.mark.loose_dtypes

KERNEL = jnp.ones((4, 3))
INPUTS = jnp.ones((2, 4))


def refused(model, params=KERNEL, inputs=INPUTS, words="not independent"):
    with pytest.raises(ModelError, match=words):
        check_independent(model, params, inputs)


# Frameworks' normalizations.


class Normalized(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(self.norm(nn.Dense(5)(x))))


def linen(norm):
    """A linen model, what it closes over, and its parameters."""
    module = Normalized(norm)
    variables = module.init(jax.random.key(0), INPUTS)
    params = variables.pop("params")

    def model(params, x, state=variables):
        return module.apply({"params": params, **state}, x, mutable=["batch_stats"])[0]

    return model, variables, params


def test_linen_batch_norm():
    model, _, params = linen(nn.BatchNorm(use_running_average=False))
    refused(model, params, words="use_running_average=True")
    model, _, params = linen(nn.BatchNorm(use_running_average=True))
    check_independent(model, params, INPUTS)


@pytest.mark.parametrize("norm", [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(num_groups=1)])
def test_linen_norms_within_an_example(norm):
    model, _, params = linen(norm)
    check_independent(model, params, INPUTS)


@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_may_be_traced(frozen):
    """Under jit, statistics that the model closes over are known no more than its parameters."""
    model, state, params = linen(nn.BatchNorm(use_running_average=frozen))

    @jax.jit
    def step(params, state, x):
        def closed(params, x):
            return model(params, x, state)

        check_independent(closed, params, x)
        return closed(params, x)

    if frozen:
        assert step(params, state, INPUTS).shape == (2, 3)
    else:
        with pytest.raises(ModelError, match="not independent"):
            step(params, state, INPUTS)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("frozen", [False, True])
def test_nnx_batch_norm(frozen):
    module = Nnx(nnx.Rngs(0))
    if frozen:
        module.eval()
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def model(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)

    if frozen:
        check_independent(model, params, INPUTS)
    else:
        refused(model, params)


# Other ways to depend on the batch.

DEPENDENT = {
    "mean": lambda h: h - jnp.mean(h, axis=0),
    "softmax": lambda h: jax.nn.softmax(h, axis=0),
    "contrastive": lambda h: jnp.pad(h @ h.T, ((0, 0), (0, 1)))[:, :1],
    "weak": lambda h: h + 1e-2 * jnp.mean(h, axis=0),
    "max": lambda h: h / jnp.max(jnp.abs(h)),
    "earlier": lambda h: jnp.cumsum(h, axis=0),
    "later": lambda h: jnp.cumsum(h, axis=0, dtype=h.dtype)[::-1],
    "neighbor": lambda h: jnp.roll(h, 1, axis=0),
    "positive": lambda h: jnp.log(h) - jnp.mean(jnp.log(h), axis=0),
    "order": lambda h: jnp.argsort(h, axis=0),
    "complex": lambda h: jnp.fft.fft(h, axis=0),
    "first": lambda h: h + h[:1],
    "last": lambda h: h * h[-1:],
    "finite": lambda h: h / (jnp.max(h) < 2),
}

INDEPENDENT = {
    "linear": lambda h: h,
    "softmax": jax.nn.softmax,
    "relu": lambda h: jax.nn.relu(h - 0.1),
    "dead": lambda h: jax.nn.relu(-jnp.exp(h)),
    "constant": jnp.zeros_like,
    "not_a_number": lambda h: jnp.full_like(h, jnp.nan),
    "square_root": jnp.sqrt,
    "overflow": lambda h: jnp.exp(1e3 * h),
    "label": lambda h: jnp.argmax(h, axis=1),
    "half": lambda h: h.astype(jnp.bfloat16),
    "matrix": lambda h: h[:, :, None] * h[:, None],
    "mapped": lambda h: jax.lax.map(jnp.tanh, h),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_dependent(name):
    refused(lambda p, x: DEPENDENT[name](x @ p))


def test_a_proof_that_fails_lets_nothing_pass(monkeypatch):
    """As on a jax whose equations have other parameters: the model is tried instead."""

    def unknown(*_):
        raise KeyError("num_consts")

    monkeypatch.setattr(separate, "_walk", unknown)
    refused(lambda p, x: (x - jnp.mean(x, 0)) @ p)
    check_independent(lambda p, x: jnp.tanh(x @ p), KERNEL, INPUTS)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent(name):
    check_independent(lambda p, x: INDEPENDENT[name](x @ p), KERNEL, INPUTS)


def test_units_that_live_for_positive_values_only():
    """A branch that one draw leaves dead is seen by another."""

    def gated(p, x):
        return x @ p + jnp.mean(jax.nn.relu(jnp.min(x, axis=1)))

    refused(gated, jnp.ones((20, 3)), jnp.ones((2, 20)))


def test_error_names_the_output():
    refused(
        lambda p, x: {"logits": x @ p, "embedding": x - jnp.mean(x, axis=0)},
        words="output 'embedding' of example 0 moved by .* when the input of example 1 alone",
    )


# What is known of parameters and inputs.


@pytest.mark.parametrize("count", [1, 2, 5])
def test_size_of_the_batch(count):
    refused(DEPENDENT_MODEL, inputs=jnp.ones((count, 4)))
    check_independent(INDEPENDENT_MODEL, KERNEL, jnp.ones((count, 4)))


def DEPENDENT_MODEL(p, x):
    return jax.nn.softmax(x @ p, axis=0)


def INDEPENDENT_MODEL(p, x):
    return jax.nn.softmax(x @ p, axis=1)


def test_shapes_and_tracers():
    """Values are not needed, nor looked at."""
    refused(DEPENDENT_MODEL, shapes(KERNEL), shapes(INPUTS))
    check_independent(INDEPENDENT_MODEL, shapes(KERNEL), shapes(INPUTS))
    check_independent(INDEPENDENT_MODEL, jnp.full_like(KERNEL, jnp.nan), INPUTS)
    for transform in (jax.jit, jax.vmap, lambda f: jax.grad(lambda p, x: jnp.sum(f(p, x)))):

        def checked(model, p, x):
            check_independent(model, p, x)
            return model(p, x)

        stacked = (KERNEL[None], INPUTS[None]) if transform is jax.vmap else (KERNEL, INPUTS)
        transform(lambda p, x: checked(INDEPENDENT_MODEL, p, x))(*stacked)
        with pytest.raises(ModelError, match="not independent"):
            transform(lambda p, x: checked(DEPENDENT_MODEL, p, x))(*stacked)


def test_values_that_are_given():
    """What depends on other examples for large values only is seen where they are given."""

    def model(p, x):
        h = x @ p
        return jnp.where(jnp.max(jnp.abs(x)) > 50, h - jnp.mean(h, axis=0), h)

    inputs = jnp.arange(8.0).reshape(2, 4)
    check_independent(model, KERNEL, shapes(inputs))
    refused(lambda p, x: model(p, x), KERNEL, 100 * inputs, words="with the values given")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool])
def test_tokens(dtype):
    """Integers index, booleans choose: both get values that do so."""
    inputs = {"tokens": jnp.zeros((2, 5), dtype), "scale": jnp.ones(2)}

    def embed(p, x):
        return jnp.take(p, x["tokens"].astype(jnp.int32), axis=0) * x["scale"][:, None, None]

    check_independent(embed, KERNEL, inputs)
    refused(lambda p, x: embed(p, x) * jnp.mean(x["tokens"]), KERNEL, inputs)


@pytest.mark.parametrize("raw", [False, True])
def test_keys_among_the_inputs(raw):
    """Dropout with a key per example is independent, with one key for all of them is not."""
    key = jax.random.PRNGKey(0) if raw else jax.random.key(0)
    inputs = {"x": INPUTS, "key": jax.random.split(key, 2)}

    def dropout(p, x):
        drop = jax.vmap(lambda key, h: jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h, 0.0))
        return drop(x["key"], x["x"] @ p)

    check_independent(dropout, KERNEL, inputs)

    def one_key(p, x):
        return x["x"] @ p * jax.random.normal(x["key"][1], (3,))

    refused(one_key, KERNEL, inputs)


def test_x64(x64):
    refused(DEPENDENT_MODEL, KERNEL.astype(jnp.float64), INPUTS.astype(jnp.float64))
    check_independent(INDEPENDENT_MODEL, KERNEL.astype(jnp.float64), INPUTS.astype(jnp.float64))


# What the check leaves alone.


def test_failing_models_pass():
    """What is wrong with them is told elsewhere."""
    check_independent(lambda p, x: x @ p.T, KERNEL, INPUTS)
    check_independent(lambda p, x: jnp.sum(x @ p), KERNEL, INPUTS)
    check_independent(lambda p, x: (x @ p).reshape(-1, 2, 3), KERNEL, INPUTS)


@pytest.mark.parametrize("context", [jax.debug_nans(True), jax.transfer_guard("disallow")])
def test_under_restrictions(context):
    """Made-up values are none of the user's."""
    with context:
        check_independent(lambda p, x: jnp.log(x @ p), KERNEL, INPUTS)
        refused(lambda p, x: jnp.log(x @ p) - jnp.mean(jnp.log(x @ p)))


def test_checked_once():
    """The same model and shapes cost one trace; neither is kept alive."""
    traces = []

    def model(p, x):
        traces.append(x.shape)
        return x @ p

    check_independent(model, KERNEL, INPUTS)
    assert traces == [(3, 4), (1, 4), (2, 4)]
    check_independent(model, shapes(KERNEL), jnp.ones((7, 4)))
    step = jax.jit(functools.partial(check_independent, model))
    step(KERNEL, INPUTS)
    assert len(traces) == 3
    check_independent(model, KERNEL, INPUTS.astype(jnp.bfloat16))
    assert len(traces) == 6
    gc.collect()
    known = len(independence._passed)
    del model, step
    gc.collect()
    assert len(independence._passed) == known - 1


def test_models_that_cannot_be_referred_to_weakly():
    class Model:
        __slots__ = ()

        def __call__(self, p, x):
            return DEPENDENT_MODEL(p, x)

    refused(Model())


# The model on a batch that is not the model on each of its examples.


def one_mask(p, x):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), 2 * x, 0.0) @ p


@jax.jit
def split_inside(p, x):
    keys = jax.random.split(jax.random.key(0), len(x))
    return x @ p + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


def in_a_loop(p, x):
    def layer(h, key):
        return h + jax.random.normal(key, h.shape), None

    return jax.lax.scan(layer, x, jax.random.split(jax.random.key(0), 2))[0] @ p


OTHERS = {
    "dropout": (one_mask, "noise for the whole batch(.|\n)*random.split"),
    "noise": (lambda p, x: x @ p + jax.random.normal(jax.random.key(0), (len(x), 1)), "noise"),
    "keys": (split_inside, "noise"),
    "loop": (in_a_loop, "noise"),
    "mean": (lambda p, x: x @ p / x.shape[0], "size of the batch"),
    "even": (lambda p, x: x @ p + (len(x) == 2), "size of the batch"),
    "alone": (lambda p, x: jax.nn.relu(x @ p) * (1 + 1e-2 * (len(x) == 1)), "size of the batch"),
    "position": (lambda p, x: (x @ p) * jnp.arange(len(x))[:, None], "position in the batch"),
    "table": (lambda p, x: x @ p + jnp.linspace(0, 1, len(x))[:, None], "position in the batch"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_on_a_batch(name):
    model, words = OTHERS[name]
    refused(model, words=f"not the model on each of its examples alone(.|\n)*{words}")


def test_traced_key():
    """A training step that closes over its key, as most do."""

    @jax.jit
    def step(p, x, key):
        def model(p, x):
            return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0.0) @ p

        check_independent(model, p, x)
        return model(p, x)

    with pytest.raises(ModelError, match="one key that it closes over"):
        step(KERNEL, INPUTS, jax.random.key(1))


def test_a_key_for_every_example():
    """What the error about noise recommends."""

    def model(p, inputs):
        x, keys = inputs
        mask = jax.vmap(lambda key, x: jax.random.bernoulli(key, 0.5, x.shape))(keys, x)
        return jnp.where(mask, 2 * x, 0.0) @ p

    check_independent(model, KERNEL, (INPUTS, jax.random.split(jax.random.key(0), len(INPUTS))))


def test_noise_that_all_examples_share():
    """It is a constant of the model."""
    check_independent(
        lambda p, x: (x + jax.random.normal(jax.random.key(0), (4,))) @ p, KERNEL, INPUTS
    )


@pytest.mark.parametrize("width", [2, 5, 40])
def test_roundoff_that_a_model_magnifies(width):
    """What comes out differs from one size of the batch to another; the model does not."""

    def inverse(p, x):
        h = jnp.tanh(x @ p)
        return jnp.linalg.inv(h[:, :, None] * h[:, None])[:, 0]

    def chaotic(p, x):
        h = x @ p
        return jnp.sin(1e5 * jnp.sum(h, axis=1, keepdims=True) * h)

    for model in (inverse, chaotic):
        check_independent(model, jnp.ones((16, width)), jnp.ones((2, 16)))


def test_roundoff_of_saturated_units():
    """A curvature of 1e-4 is roundoff where slopes are of size 1: another on a smaller batch."""

    def u(p, x):
        return jnp.tanh(jnp.tanh(x @ p["v"]) @ p["w"])[0]

    def laplacian(p, x):
        return jax.vmap(lambda x: jnp.trace(jax.hessian(lambda x: u(p, x))(x))[None])(x)

    for scale in (1.0, 8.0):  # of what is made up
        model = lambda p, x, s=scale: laplacian(jax.tree.map(lambda a: s * a, p), x)  # noqa: E731
        check_independent(model, {"v": jnp.ones((2, 64)), "w": jnp.ones((64, 1))}, jnp.ones((2, 2)))
