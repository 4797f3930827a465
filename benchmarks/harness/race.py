"""Trains several optimizers on the same batches from the same start, and times updates alone."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import interrupt
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.optimizers import Optimizer, evaluated_params


class Point(NamedTuple):
    """Where a training is after some updates."""

    update: int
    seconds: float  # of updates alone: compilation and evaluation are left out
    loss: Any  # a number, or one for each of the trainings that run side by side


def batches(
    images: np.ndarray, targets: np.ndarray, size: int, seed: int, start: int = 0
) -> Iterator[Any]:
    """Batches of reshuffled passes over the data, without end, from the update `start` on."""
    for batch, _ in draw_batches((images, targets), size, seed=seed, start=start):
        yield jax.device_put(batch)


@functools.lru_cache(maxsize=8)
def _compiled(optimizer: Optimizer) -> Callable[..., Any]:
    """The same function for the same optimizer, so that other seeds compile nothing."""
    return jax.jit(optimizer.step)


class Step(NamedTuple):
    """What there is after an update."""

    update: int
    seconds: float  # of updates alone, so far
    params: Any
    state: Any
    value: Any  # what the step returned beside them


def timed_steps(
    step: Callable[..., Any],
    params: Any,
    state: Any,
    data: Iterator[Any],
    seed: int = 0,
    updates: float = math.inf,
    seconds: float = math.inf,
    after: tuple[int, float] = (0, 0.0),
) -> Iterator[Step]:
    """Steps on batch after batch, for so many updates or seconds, whichever ends first.

    Neither drawing the batches nor what is done between the steps is timed. A training that goes
    on is `after` so many updates and seconds, which count. Ctrl-C is heeded between the steps.
    """
    key, (done, spent) = jax.random.key(seed), after
    for update in itertools.count(done + 1):
        interrupt.check()
        batch, draw = next(data), jax.random.fold_in(key, update)
        start = time.perf_counter()
        params, state, value = jax.block_until_ready(step(params, state, batch, draw))
        spent += time.perf_counter() - start
        yield Step(update, spent, params, state, value)
        if update >= updates or spent >= seconds:
            return


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
    """Trains and evaluates, the average of the parameters where one is kept; stops where lost."""
    state, step = optimizer.init(params), _compiled(optimizer)
    first = next(data)
    jax.block_until_ready(step(params, state, first, jax.random.key(seed)))  # compiles, if need be
    points = [Point(0, 0.0, _losses(evaluate(params)))]
    data = itertools.chain([first], data)
    for at in timed_steps(step, params, state, data, seed, updates, seconds):
        params = at.params
        if at.update % eval_every == 0 or at.update == updates or at.seconds >= seconds:
            average = evaluated_params(params, at.state)
            points.append(Point(at.update, at.seconds, _losses(evaluate(average))))
            if not np.isfinite(points[-1].loss).any():
                break
    return points, params


def points_of(
    optimizer: Optimizer, task: Any, updates: int, eval_every: int, seed: int,
    seconds: float = math.inf,
) -> list[Point]:  # fmt: skip
    """`run` on a task, from the start and on the batches of a seed."""
    own = task.start(seed), task.batches(seed), task.evaluate
    return run(optimizer, *own, updates, eval_every, seed, seconds)[0]


def points(found: Iterable[Any]) -> list[Point]:
    """The points that were written down as JSON."""
    return [Point(*point) for point in found]


def _losses(evaluated: Any) -> Any:
    return np.asarray(evaluated, np.float64).tolist()
