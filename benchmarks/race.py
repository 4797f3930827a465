"""Trains several optimisers on the same batches from the same start, and times updates alone."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import kfgn
from benchmarks.optimizers import Optimizer


class Point(NamedTuple):
    """Where a training is after some updates."""

    update: int
    seconds: float  # of updates alone: compilation and evaluation are left out
    loss: Any  # a number, or one for each of the trainings that run side by side


def batches(images: np.ndarray, targets: np.ndarray, size: int, seed: int) -> Iterator[Any]:
    """Batches of reshuffled passes over the data, without end."""
    for batch, _ in kfgn.batches((images, targets), size, seed=seed):
        yield jax.device_put(batch)


@functools.lru_cache(maxsize=8)
def _compiled(optimizer: Optimizer) -> Callable[..., Any]:
    """The same function for the same optimiser, so that other seeds compile nothing."""
    return jax.jit(optimizer.step)


def run(
    optimizer: Optimizer,
    params: Any,
    data: Iterator[Any],
    evaluate: Callable[[Any], Any],
    updates: int,
    eval_every: int,
    seed: int = 0,
    seconds: float = math.inf,
) -> tuple[list[Point], Any]:
    """Trains for so many updates or seconds, whichever ends first; stops where the loss is lost."""
    state, step = optimizer.init(params), _compiled(optimizer)
    batch, key = next(data), jax.random.key(seed)
    jax.block_until_ready(step(params, state, batch, key))  # compiles, where it has to
    points, spent = [Point(0, 0.0, _losses(evaluate(params)))], 0.0
    for update in range(1, updates + 1):
        start = time.perf_counter()
        params, state, _ = step(params, state, batch, jax.random.fold_in(key, update))
        jax.block_until_ready(params)
        spent += time.perf_counter() - start
        if update % eval_every == 0 or update == updates or spent >= seconds:
            points.append(Point(update, spent, _losses(evaluate(params))))
            if spent >= seconds or not np.isfinite(points[-1].loss).any():
                break
        batch = next(data)
    return points, params


def _losses(evaluated: Any) -> Any:
    return np.asarray(evaluated, np.float64).tolist()
