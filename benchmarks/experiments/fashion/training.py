"""Classifiers for `fashion`, and the two ways they are trained and timed.

Seconds are those of training alone: compiling and measuring are not in them.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import kfgn
from benchmarks.harness.measures import bias_variance
from benchmarks.harness.optimizers import Optimizer
from benchmarks.harness.race import timed_steps
from benchmarks.harness.timing import compiled

Arrays = tuple[jax.Array, jax.Array]
MEASUREMENTS = 20  # of a run that goes by iterations, about


class Classifier(nn.Module):
    """Hidden layers of logistic units, and logits; flax's LeCun normal start."""

    hidden: int
    width: int
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        for _ in range(self.hidden):
            x = nn.sigmoid(nn.Dense(self.width)(x))
        return nn.Dense(self.classes)(x)


class Point(NamedTuple):
    """Where a run was at one moment. Losses are cross-entropies; the objective has the penalty."""

    iteration: int
    seconds: float
    objective: float
    train_loss: float
    train_accuracy: float
    dev_loss: float
    dev_accuracy: float

    @property
    def gap(self) -> float:
        """By how much accuracy is higher on the images that are trained on."""
        return self.train_accuracy - self.dev_accuracy


@dataclass
class Run:
    """One method on one problem."""

    method: str
    points: list[Point] = field(default_factory=list)
    evaluations: int | None = None  # of value and gradient, where a line search makes several
    compile_seconds: float | None = None
    cg_iterations: list[int] = field(default_factory=list)  # of every update, for Hessian-free
    damping: float | None = None  # the last, for Hessian-free
    note: str = ""
    params: Any = None

    @property
    def last(self) -> Point:
        """The end of the run."""
        return self.points[-1]

    def column(self, name: str) -> list[float]:
        """One number of every point."""
        return [getattr(point, name) for point in self.points]

    def seconds_to(self, objective: float) -> float | None:
        """The time of the first measurement at which the objective was as low."""
        return next((p.seconds for p in self.points if p.objective <= objective), None)

    def report(self) -> dict[str, Any]:
        """All of it but the parameters, for JSON."""
        return {
            "method": self.method,
            "note": self.note,
            "evaluations": self.evaluations,
            "compile_seconds": self.compile_seconds,
            "damping": self.damping,
            "points": [point._asdict() for point in self.points],
            "cg_iterations": self.cg_iterations,
        }


class Problem:
    """A classifier, its objective, and the batches that stay what they are."""

    def __init__(
        self, module: nn.Module, l2: float, batches: Sequence[Any], dev: Any, seed: int
    ) -> None:
        loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
        self.module, self.seed = module, seed
        self.objective = kfgn.Objective(module.apply, loss, l2=l2)
        self.batches: list[Arrays] = [_on_device(batch) for batch in batches]
        # The mean over all fixed batches, eq. (28), is the objective of their union.
        inputs, labels = (jnp.concatenate(parts) for parts in zip(*self.batches, strict=True))
        self.train: Arrays = (inputs, labels)
        self.dev = _on_device(dev)
        self.params = module.init(jax.random.key(seed), inputs[:1])
        self._figures = jax.jit(bias_variance(self.objective, chunk_size=10_000))

    def measure(self, params: Any, iteration: int, seconds: float) -> Point:
        """Losses and accuracies on the images trained on and on the others."""
        figures = map(float, self._figures(params, self.train, self.dev))
        train_loss, *rest = figures
        objective = train_loss + float(self.objective.penalty(params))
        return Point(iteration, seconds, objective, train_loss, *rest)


def minimize(problem: Problem, name: str, method: str, iterations: int) -> Run:
    """scipy's minimizer on the union of the batches, as Veitch ran it."""
    run, every = Run(name), max(1, iterations // MEASUREMENTS)
    run.points.append(problem.measure(problem.params, 0, 0.0))
    marks = [0.0]  # seconds after every iteration
    resumed = time.perf_counter()

    def callback(params: Any, value: float) -> None:
        nonlocal resumed
        del value
        marks.append(marks[-1] + time.perf_counter() - resumed)
        if (len(marks) - 1) % every == 0:
            run.points.append(problem.measure(params, len(marks) - 1, marks[-1]))
        resumed = time.perf_counter()

    found = kfgn.solvers.minimize(
        problem.objective, problem.params, problem.train, method,
        max_iterations=iterations, callback=callback,
    )  # fmt: skip
    done = len(marks) - 1
    if run.last.iteration < done:
        run.points.append(problem.measure(found.params, done, marks[-1]))
    run.params, run.evaluations, run.note = found.params, found.evaluations, found.message
    return _without_compiling(run, marks)


def _without_compiling(run: Run, marks: list[float]) -> Run:
    """Takes the first iteration, in which scipy's function is compiled, for one like the others."""
    if len(marks) > 2:
        excess = max(0.0, marks[1] - statistics.median(np.diff(marks[1:]).tolist()))
        run.compile_seconds = excess
        first, *others = run.points
        run.points = [first, *(p._replace(seconds=p.seconds - excess) for p in others)]
    return run


def train(
    problem: Problem,
    optimizer: Optimizer,
    batches: Sequence[Arrays],
    iterations: int | None = None,
    seconds: float = math.inf,
    name: str | None = None,
    tell: Callable[[Any], Any] = lambda state: None,
) -> Run:
    """Steps on the batches in turn, so many of them or for so long; `tell` sees every state."""
    run, params = Run(name or optimizer.name), jax.tree.map(jnp.copy, problem.params)
    state = optimizer.init(params)
    example = params, state, batches[0], jax.random.key(problem.seed)
    step, run.compile_seconds, _ = compiled(optimizer.step, *example)
    run.points.append(problem.measure(params, 0, 0.0))
    every = max(1, iterations // MEASUREMENTS) if iterations else None
    pause, most = 0.01 * seconds, math.inf if iterations is None else iterations
    data = itertools.cycle(batches)
    for at in timed_steps(step, params, state, data, problem.seed, most, seconds):
        params = at.params
        tell(at.state)
        lost = not math.isfinite(float(at.value))
        last = lost or at.update >= most or at.seconds >= seconds
        if last or (at.seconds >= pause if every is None else at.update % every == 0):
            run.points.append(problem.measure(params, at.update, at.seconds))
            # Most of the way is made early.
            pause = max(1.2 * at.seconds, at.seconds + 0.01 * seconds)
        if lost:
            run.note = "diverged"
            break
    run.params = params
    return run


def _on_device(batch: Any) -> Arrays:
    inputs, labels = batch
    return jnp.asarray(inputs), jnp.asarray(labels)
