"""An autoencoder of one data set, ready for any optimizer: what the races between them share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfgn
from benchmarks import BenchmarkError, datasets
from benchmarks.harness import race
from benchmarks.harness.arguments import unknown
from benchmarks.harness.models import Autoencoder, initial_params

EVALUATED = 10_000  # of the training images, the first ones


class Task(NamedTuple):
    """Images, the objective on them, the start of every seed, and the loss to report."""

    dataset: datasets.Dataset
    model: Autoencoder
    objective: kfgn.Objective
    batch_size: int
    held: jax.Array  # training images that a loss is evaluated on
    start: Callable[[int], Any]  # of a seed: the parameters
    mean_loss: Callable[[Any, jax.Array], Any]  # of parameters on images, without the penalty

    @property
    def images(self) -> np.ndarray:
        """To train on."""
        return self.dataset.train

    @property
    def example_batch(self) -> tuple[jax.Array, jax.Array]:
        """For its shapes."""
        first = jnp.asarray(self.images[: self.batch_size])
        return first, first

    def batches(self, seed: int, start: int = 0) -> Iterator[Any]:
        """Batches without end, the same for every optimizer with the same seed."""
        return race.batches(self.images, self.images, self.batch_size, seed, start)

    def evaluate(self, params: Any) -> Any:
        """The training loss."""
        return self.mean_loss(params, self.held)


def images(name: str, folder: Path | None, at_least: int) -> datasets.Dataset:
    """A data set by its name, as the command line gives it, with a batch of images."""
    if name not in datasets.NAMES:
        raise BenchmarkError(unknown("data set", name, datasets.NAMES))
    found = datasets.load(name, data_dir=folder)
    if len(found.train) < at_least:
        count = len(found.train)
        raise BenchmarkError(f"{name} has {count} images, fewer than a batch: {at_least}")
    return found


def autoencoder(
    data: str, folder: Path | None, layers: Sequence[int], batch_size: int, l2: float
) -> Task:
    """The task of a data set's name."""
    found = images(data, folder, batch_size)
    model = Autoencoder(found.train.shape[1], layers)
    objective = kfgn.Objective(model.apply, getattr(kfgn.losses, found.loss), l2=l2)
    return Task(
        found, model, objective, batch_size, jnp.asarray(found.train[:EVALUATED]),
        functools.cache(lambda seed: initial_params(model, seed)),
        jax.jit(lambda params, images: objective.mean_loss(params, (images, images))),
    )  # fmt: skip
