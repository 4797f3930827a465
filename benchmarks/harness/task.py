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
from benchmarks import BenchmarkError
from benchmarks.datasets import NAMES, DataError, load
from benchmarks.harness import race
from benchmarks.harness.models import Autoencoder, initial_params
from benchmarks.harness.optimizers import closest

EVALUATED = 10_000  # of the training images, the first ones


class Task(NamedTuple):
    """Images, the objective on them, the start of every seed, and the loss to report."""

    data: str
    images: np.ndarray
    loss: str
    objective: kfgn.Objective
    batch_size: int
    start: Callable[[int], Any]  # of a seed: the parameters
    evaluate: Callable[[Any], Any]  # the mean training loss, without the penalty

    @property
    def example_batch(self) -> tuple[jax.Array, jax.Array]:
        """For its shapes."""
        first = jnp.asarray(self.images[: self.batch_size])
        return first, first

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches without end, the same for every optimizer with the same seed."""
        return race.batches(self.images, self.images, self.batch_size, seed)


def autoencoder(
    data: str, folder: Path | None, layers: Sequence[int], batch_size: int, l2: float
) -> Task:
    """The task of a data set's name, as the command line gives it."""
    if data not in NAMES:
        raise closest("data set", data, NAMES)
    try:
        found = load(data, data_dir=folder)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    images = found.train
    if len(images) < batch_size:
        raise BenchmarkError(f"{data} has {len(images)} images, fewer than a batch: {batch_size}")
    model = Autoencoder(images.shape[1], layers)
    objective = kfgn.Objective(model.apply, getattr(kfgn.losses, found.loss), l2=l2)
    held = jnp.asarray(images[:EVALUATED])
    return Task(
        data, images, found.loss, objective, batch_size,
        functools.cache(lambda seed: initial_params(model, seed)),
        jax.jit(lambda params: objective.mean_loss(params, (held, held))),
    )  # fmt: skip
