"""The tasks of the suite: models as users write them, on data that is had without asking."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import kfgn
from benchmarks import datasets
from benchmarks.experiments import poisson as equation
from benchmarks.experiments.mixture import MIXTURE
from benchmarks.experiments.trainings import images, others, sequences
from benchmarks.experiments.trainings.task import Task, of_data, started
from benchmarks.harness.models import ENCODER, Autoencoder, chain, chain_params, hidden_values

HELD = 2000  # examples that losses are evaluated on
ELSE = 1000  # added to the seed of data that are drawn: those of the test
ALL, PAIR = ("kfra", "kfac", "kflr"), ("kfra", "kfac")


class Suited(NamedTuple):
    """A task, with how it is measured."""

    task: Task
    test: Callable[[Any], jax.Array] | None = None
    seconds: float = 60.0  # of updates, of every full training
    methods: tuple[str, ...] = ALL
    deterministic: bool = False  # the same batch at every update


Rows = Callable[[Any, jax.Array], Any]


def _supervised(
    module: nn.Module, loss: Any, data: Any, test: Any, seed: int, size: int,
    rows: Rows = lambda batch, key: batch, **more: Any,
) -> Suited:  # fmt: skip
    """Random batches, and losses on the first examples for training and for test."""
    objective = kfgn.Objective(module.apply, loss)
    params = started(module, rows(data, jax.random.key(0))[0], seed)

    def on(data: Any) -> Callable[[Any], jax.Array]:
        held = rows(jax.tree.map(lambda a: a[:HELD], data), jax.random.key(9))
        return lambda params: objective.mean_loss(params, held)

    task = of_data(objective, params, data, size, rows)._replace(evaluate=on(data))
    return Suited(task, None if test is None else on(test), **more)


@functools.cache
def _pictures(name: str, folder: Path | None) -> tuple[Any, Any, str]:
    """Training images and labels, and those of the test, and the loss that they ask for."""
    found = datasets.load(name, data_dir=folder)
    parts = (found.train, found.train_labels), (found.test, found.test_labels)
    return *jax.tree.map(jnp.asarray, parts), found.loss


def _autoencoder(name: str, seed: int, folder: Path | None) -> Suited:
    """The paper's network."""
    (train, _), (test, _), loss = _pictures(name, folder)
    network = Autoencoder(train.shape[1], ENCODER)
    own = getattr(kfgn.losses, loss)
    return _supervised(network, own, (train, train), (test, test), seed, 1000,
                       seconds=180.0, methods=PAIR)  # fmt: skip


def _mixture(seed: int, folder: Path | None) -> Suited:
    """Odd from even digits by a mixture of two classifiers."""
    train, test, _ = _pictures("mnist", folder)
    data, held = ((x, (labels % 2).astype(jnp.float32)) for x, labels in (train, test))
    params = chain_params((data[0].shape[1], *ENCODER, 3), seed)
    objective = kfgn.Objective(chain(), MIXTURE)
    first = jax.tree.map(lambda a: a[:HELD], (data, held))
    task = of_data(objective, params, data, 1000)
    task = task._replace(evaluate=lambda params: objective.mean_loss(params, first[0]))
    return Suited(task, lambda params: objective.mean_loss(params, first[1]))


def _perceptron(width: int, methods: tuple[str, ...], seed: int, folder: Path | None) -> Suited:
    """Fashion-MNIST by two hidden layers of rectifiers."""
    train, test, _ = _pictures("fashion_mnist", folder)
    layers: list[Any] = [nn.Dense(width), nn.relu, nn.Dense(width), nn.relu, nn.Dense(10)]
    return _supervised(nn.Sequential(layers), images.cross_entropy, train, test, seed, 500,
                       methods=methods)  # fmt: skip


class _Residual(nn.Module):
    """Three residual blocks of two convolutions each, with GroupNorm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Conv(16, (3, 3), 2)(x.reshape(-1, 28, 28, 1))
        for width, stride in (16, 1), (32, 2), (64, 2):
            a = nn.relu(nn.GroupNorm(4)(nn.Conv(width, (3, 3), stride)(h)))
            a = nn.GroupNorm(4)(nn.Conv(width, (3, 3))(a))
            short = h if stride == 1 else nn.Conv(width, (1, 1), stride)(h)
            h = nn.relu(a + short)
        return nn.Dense(10)(jnp.mean(h, axis=(1, 2)))


def _resnet(seed: int, folder: Path | None) -> Suited:
    train, test, _ = _pictures("fashion_mnist", folder)
    return _supervised(_Residual(), images.cross_entropy, train, test, seed, 256, methods=PAIR)


class _Variational(nn.Module):
    """784-400-20-400-784, the noise drawn from a key for each example."""

    @nn.compact
    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        x, keys = inputs
        h = nn.tanh(nn.Dense(400)(x))
        mean, log_variance = nn.Dense(20)(h), nn.Dense(20)(h)
        noise = jax.vmap(lambda key: jax.random.normal(key, (20,)))(keys)
        h = nn.tanh(nn.Dense(400)(mean + jnp.exp(0.5 * log_variance) * noise))
        logits = nn.Dense(x.shape[1])(h)
        return {"logits": logits, "mean": mean, "log_variance": log_variance}


def _variational(seed: int, folder: Path | None) -> Suited:
    (train, _), (test, _), _ = _pictures("mnist", folder)

    def bound(outputs: dict[str, jax.Array], image: jax.Array) -> jax.Array:
        logits, mean, s = outputs["logits"], outputs["mean"], outputs["log_variance"]
        fit = jnp.sum(jax.nn.softplus(logits) - logits * image)
        return fit + 0.5 * jnp.sum(mean**2 + jnp.exp(s) - s - 1)

    def with_keys(batch: Any, key: jax.Array) -> Any:
        pictures, targets = batch
        return (pictures, jax.random.split(key, len(pictures))), targets

    loss = kfgn.losses.from_function(bound, convex=True)
    return _supervised(_Variational(), loss, (train, train), (test, test), seed, 500, with_keys,
                       methods=PAIR)  # fmt: skip


def _equation(model: Callable[..., Any], drawn: Callable[[int], Any], seed: int) -> Suited:
    """A network 2-32-32-1 whose derivatives are taken in the model; always the same points."""
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    found = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), [*map(drawn, (seed, seed + ELSE))])
    losses = [lambda p, batch=batch: objective.mean_loss(p, batch) for batch in found]
    params = chain_params((2, 32, 32, 1), seed)
    task = Task(objective, params, lambda key, _: found[0], losses[0])
    # KFRA walks through the derivatives: an update takes hundreds of gradients.
    return Suited(task, losses[1], methods=("kfac", "kflr"), deterministic=True)


def _poisson(seed: int, _: Path | None) -> Suited:
    """-Δu = f in the unit square, u = 0 on its boundary."""

    def drawn(seed: int) -> Any:
        inside, edge = np.random.default_rng(seed).uniform(size=(2, 500, 2))
        k = np.arange(500)
        edge[k, k % 2] = k // 2 % 2
        return (inside, edge), np.zeros((500, 2))

    return _equation(equation.residuals, drawn, seed)


def _heat(seed: int, _: Path | None) -> Suited:
    """u_t = 0.1 u_xx for x and t in [0, 1], from sin(πx), zero at both ends."""

    def model(params: Any, points: tuple[jax.Array, jax.Array]) -> jax.Array:
        def u(x: jax.Array) -> jax.Array:
            return hidden_values(params, x)[-1][0]

        def one(inside: jax.Array, edge: jax.Array) -> jax.Array:
            left = jax.grad(u)(inside)[1] - 0.1 * jax.hessian(u)(inside)[0, 0]
            return jnp.stack([left, 10.0 * u(edge)])

        return jax.vmap(one)(*points)

    def drawn(seed: int) -> Any:
        inside, edge = np.random.default_rng(seed).uniform(size=(2, 500, 2))
        side = np.arange(500) % 4  # both ends a quarter each, the start a half
        edge[side == 0, 0], edge[side == 1, 0], edge[side > 1, 1] = 0, 1, 0
        values = np.where(side > 1, 10 * np.sin(np.pi * edge[:, 0]), 0)
        return (inside, edge), np.stack([np.zeros(500), values], axis=1)

    return _equation(model, drawn, seed)


def _tabular(seed: int, _: Path | None) -> Suited:
    """Mean and variance of a number, 128 examples at a time."""
    held = others.tabular(seed + ELSE)
    return Suited(others.tabular(seed, size=128), held.evaluate)


def _transformer(seed: int, _: Path | None) -> Suited:
    """The next of 32 characters."""
    task, text = sequences.transformer(seed), sequences.later_characters()
    held = text[:, :-1], text[:, 1:]
    return Suited(task, lambda params: task.objective.mean_loss(params, held), methods=PAIR)


def _gru(seed: int, _: Path | None) -> Suited:
    """The sum of two of 40 numbers."""
    held = sequences.adding(seed + ELSE)
    # KFRA unrolls the loop: its update was not compiled after a minute.
    return Suited(sequences.adding(seed), held.evaluate, methods=("kfac", "kflr"))


Make = Callable[[int, Path | None], Suited]
TASKS: dict[str, Make] = {
    **{name: functools.partial(_autoencoder, name) for name in ("curves", "mnist", "faces")},
    "mixture": _mixture,
    "fashion": functools.partial(_perceptron, 300, ALL),
    "resnet": _resnet,
    "transformer": _transformer,
    "gru": _gru,
    "variational": _variational,
    "poisson": _poisson,
    "heat": _heat,
    "wide": functools.partial(_perceptron, 4000, PAIR),
    "tabular": _tabular,
}
