"""Trainings on scikit-learn's digits, 1,500 images of 8 x 8 pixels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import kfgn
from benchmarks import datasets
from benchmarks.experiments.trainings.task import Task, of_data, started
from benchmarks.harness.models import Autoencoder

CLASSES = 10
cross_entropy = kfgn.losses.softmax_cross_entropy_with_integer_labels


@functools.cache
def digits() -> tuple[jax.Array, jax.Array]:
    """Images `[1500, 64]`, and their labels."""
    data = datasets.load("digits")
    return jnp.asarray(data.train), jnp.asarray(data.train_labels)


def squares() -> tuple[jax.Array, jax.Array]:
    """The images as `[1500, 8, 8, 1]`."""
    images, labels = digits()
    return images.reshape(-1, 8, 8, 1), labels


def supervised(module: nn.Module, data: Any, seed: int, loss: kfgn.losses.Loss, size: int) -> Task:
    """A module and a loss of its outputs."""
    params = started(module, data[0], seed)
    return of_data(kfgn.Objective(module.apply, loss), params, data, size)


def classifier(seed: int) -> Task:
    """Two hidden layers of rectifiers."""
    layers: list[Any] = [nn.Dense(128), nn.relu, nn.Dense(64), nn.relu, nn.Dense(CLASSES)]
    return supervised(nn.Sequential(layers), digits(), seed, cross_entropy, 256)


class Convolutions(nn.Module):
    """Two convolutions, each with a normalization, and the mean over pixels."""

    batch: bool  # normalize over the batch, or over groups of channels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width, stride in (16, 1), (32, 2):
            x = nn.Conv(width, (3, 3), stride)(x)
            if self.batch:
                x = nn.BatchNorm(use_running_average=False, axis_name="batch")(x)
            else:
                x = nn.GroupNorm(4)(x)
            x = nn.relu(x)
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


def convolutions(seed: int) -> Task:
    """A small convolutional network with GroupNorm."""
    return supervised(Convolutions(batch=False), squares(), seed, cross_entropy, 128)


def batch_norm(seed: int) -> Task:
    """The same with BatchNorm, whose running averages are auxiliary outputs."""
    module, data = Convolutions(batch=True), squares()
    variables = module.init(jax.random.key(seed), data[0][:2])

    def model(params: Any, x: jax.Array) -> Any:
        state = {"params": params, "batch_stats": variables["batch_stats"]}
        return module.apply(state, x, mutable=["batch_stats"])

    objective = kfgn.Objective(model, cross_entropy, axis_name="batch", has_aux=True)
    return of_data(objective, variables["params"], data, 128)


def autoencoder(seed: int) -> Task:
    """64-128-32-8-32-128-64, with Bernoulli outputs."""
    images, _ = digits()
    loss = kfgn.losses.sigmoid_binary_cross_entropy
    return supervised(Autoencoder(64, (128, 32, 8)), (images, images), seed, loss, 256)


class Variational(nn.Module):
    """Encoder, noise, and a decoder with dropout; a key for each example among the inputs."""

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        x, keys = inputs
        h = nn.tanh(nn.Dense(64)(x))
        mean, log_variance = nn.Dense(8)(h), nn.Dense(8)(h)
        noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
        h = nn.tanh(nn.Dense(64)(mean + jnp.exp(0.5 * log_variance) * noise))
        kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 1), 0.9, (64,)))
        h = jnp.where(kept(keys), h / 0.9, 0)
        return {"logits": nn.Dense(64)(h), "mean": mean, "log_variance": log_variance}


def variational(seed: int) -> Task:
    """A variational autoencoder, by the negative evidence lower bound."""

    def bound(outputs: dict[str, jax.Array], image: jax.Array) -> jax.Array:
        logits, mean, s = outputs["logits"], outputs["mean"], outputs["log_variance"]
        fit = jnp.sum(jax.nn.softplus(logits) - logits * image)
        return fit + 0.5 * jnp.sum(mean**2 + jnp.exp(s) - s - 1)

    def with_keys(batch: Any, key: jax.Array) -> Any:
        images, targets = batch
        return (images, jax.random.split(key, len(images))), targets

    module, (images, _) = Variational(), digits()
    params = started(module, with_keys((images, images), jax.random.key(0))[0], seed)
    loss = kfgn.losses.from_function(bound, convex=True)
    objective = kfgn.Objective(module.apply, loss)
    return of_data(objective, params, (images, images), 256, with_keys)


def low_rank(seed: int) -> Task:
    """LoRA: a trained classifier's kernels plus `A @ B`, on images that are turned."""
    task, (images, labels) = classifier(seed), squares()
    adam, frozen = optax.adam(3e-3), task.params

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(task.objective)(params, task.draw(key, params))
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = adam.init(frozen)
    for k in range(100):
        frozen, state = step(frozen, state, jax.random.key(k))
    kernels = list(frozen["params"].values())
    keys = jax.random.split(jax.random.key(seed), len(kernels))
    params = {
        f"layer {k}": {
            "A": jax.random.normal(key, (len(own["kernel"]), 4)) / len(own["kernel"]) ** 0.5,
            "B": jnp.zeros((4, own["kernel"].shape[1])),
        }
        for k, (key, own) in enumerate(zip(keys, kernels, strict=True))
    }

    def model(params: Any, x: jax.Array) -> jax.Array:
        for k, (own, low) in enumerate(zip(kernels, params.values(), strict=True)):
            x = x @ (own["kernel"] + low["A"] @ low["B"]) + own["bias"]
            x = nn.relu(x) if k + 1 < len(kernels) else x
        return x

    turned = jnp.rot90(images, axes=(1, 2)).reshape(-1, 64)
    return of_data(kfgn.Objective(model, cross_entropy), params, (turned, labels), 256)


def experts(seed: int) -> Task:
    """A mixture of four experts, one for each image by the greatest gate."""

    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            h = nn.relu(nn.Dense(64)(x))
            gate = jax.nn.softmax(nn.Dense(4)(h))
            kernels = self.param("experts", nn.initializers.lecun_normal(), (4, 64, 64))
            own = jnp.einsum("ni,nio->no", h, kernels[jnp.argmax(gate, axis=-1)])
            h = h + jnp.max(gate, axis=-1, keepdims=True) * nn.relu(own)
            return nn.Dense(CLASSES)(h)

    return supervised(Mixture(), digits(), seed, cross_entropy, 256)


def equilibrium(seed: int) -> Task:
    """A deep equilibrium model, by a fixed number of iterations."""

    class Equilibrium(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            small = nn.initializers.variance_scaling(0.2, "fan_in", "normal")
            kernel = self.param("kernel", small, (48, 48))
            forced = nn.Dense(48)(x)
            z = jax.lax.fori_loop(
                0, 12, lambda _, z: jnp.tanh(z @ kernel + forced), jnp.zeros_like(forced)
            )
            return nn.Dense(CLASSES)(z)

    return supervised(Equilibrium(), digits(), seed, cross_entropy, 256)


def contrastive(seed: int) -> Task:
    """Two noisy views of an image find each other among the 16 of a group."""
    images, _ = digits()
    groups = images[:1488].reshape(-1, 16, 64)

    def views(batch: Any, key: jax.Array) -> Any:
        (own, labels), noise = batch, 0.3 * jax.random.normal(key, (2, *batch[0].shape))
        return (own + noise[0], own + noise[1]), labels

    class Similarities(nn.Module):
        @nn.compact
        def __call__(self, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            network = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(16)])
            a, b = (network(x) for x in pair)
            a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
            inverse_temperature = jnp.exp(self.param("temperature", lambda _: jnp.array(1.0)))
            return inverse_temperature * jnp.einsum("ngi,nhi->ngh", a, b)

    labels = jnp.broadcast_to(jnp.arange(16), groups.shape[:2])
    module, data = Similarities(), (groups, labels)
    params = started(module, (groups, groups), seed)
    return of_data(kfgn.Objective(module.apply, cross_entropy), params, data, 32, views)
