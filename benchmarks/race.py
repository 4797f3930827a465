"""Trains several optimisers on the same batches from the same start, and times updates alone."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.optimizers import Optimizer


class Point(NamedTuple):
    """Where a training is after some updates."""

    update: int
    seconds: float  # of updates alone: compilation and evaluation are left out
    loss: float


def batches(images: np.ndarray, targets: np.ndarray, size: int, seed: int) -> Iterator[Any]:
    """Batches of reshuffled passes over the data, without end."""
    order = np.random.default_rng(seed)
    while True:
        shuffled = order.permutation(len(images))
        for start in range(0, len(images) - size + 1, size):
            chosen = shuffled[start : start + size]
            yield jnp.asarray(images[chosen]), jnp.asarray(targets[chosen])


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
    points, spent = [Point(0, 0.0, float(evaluate(params)))], 0.0
    for update in range(1, updates + 1):
        start = time.perf_counter()
        params, state, _ = step(params, state, batch, jax.random.fold_in(key, update))
        jax.block_until_ready(params)
        spent += time.perf_counter() - start
        if update % eval_every == 0 or update == updates or spent >= seconds:
            points.append(Point(update, spent, float(evaluate(params))))
            if spent >= seconds or not math.isfinite(points[-1].loss):
                break
        batch = next(data)
    return points, params
