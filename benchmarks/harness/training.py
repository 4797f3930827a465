"""The training loop: the same for every optimizer, interruptible, and timed apart from the rest."""

import contextlib
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.display import Progress
from benchmarks.harness.optimizers import (
    Optimizer,
    Params,
    State,
    default_learning_rate,
    evaluated_params,
    first_order,
    state_metrics,
)
from benchmarks.harness.runs import Metrics, Row

CHECKPOINT_SECONDS = 60.0  # between checkpoints, when they go by the clock
YARDSTICK_STEPS = 20  # SGD steps that are timed, after a few to warm up
TEST_EVERY = 10  # evaluations of the training loss to one of the test loss

STDERR = 2  # the file descriptor

TrainStep = Callable[..., tuple[Params, State, jax.Array]]


@dataclass(frozen=True)
class Problem:
    """What is minimized, and where training starts."""

    objective: Any
    mean_loss: Callable[[Params, jax.Array], jax.Array]  # jitted, without regularization
    train: jax.Array
    evaluated_train: jax.Array
    evaluated_test: jax.Array
    initial_params: Params
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Schedule:
    """When to stop, evaluate and save. Of no influence on the numbers."""

    updates: int
    eval_every: int
    checkpoint_every: int | None = None  # None: by the clock

    def next_pause(self, update: int) -> int:
        """The first update after this one at which something other than training is due."""
        periods = (self.eval_every, self.checkpoint_every or self.eval_every)
        return min(self.updates, *(update + period - update % period for period in periods))


@dataclass
class Position:
    """How far a run has come: all that a resumed run needs."""

    params: Params
    state: State
    update: int = 0
    seconds: float = 0.0

    def usable(self) -> bool:
        """False if a step was stopped between taking these buffers and returning new ones."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves((self.params, self.state)))

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps as arrays."""
        return {"params": self.params, "state": self.state}

    def numbers(self) -> dict[str, float]:
        """What a checkpoint keeps beside the arrays."""
        return {"seconds": self.seconds}


class Batches:
    """Which examples an update sees: a fresh permutation every epoch, from the seed alone."""

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int32)

    def indices(self, update: int) -> np.ndarray:
        """The rows of the training set that make up the batch of this update."""
        epoch, place = divmod(update, self.examples // self.batch_size)
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
            self._epoch, self._order = epoch, order.astype(np.int32)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def start(problem: Problem, optimizer: Optimizer) -> Position:
    """The position before the first update."""
    # Copied, because the steps write over these buffers: the next optimizer starts there too, and
    # a state may begin as the parameters themselves.
    params = jax.tree.map(jnp.copy, problem.initial_params)
    return Position(params, jax.tree.map(jnp.copy, optimizer.init(params)))


def compile_step(
    problem: Problem, optimizer: Optimizer, position: Position
) -> tuple[TrainStep, float]:
    """Compiles one update on given rows of the training set; also returns the seconds it took."""

    def train_step(
        params: Params, state: State, train: jax.Array, indices: jax.Array, update: jax.Array
    ) -> tuple[Params, State, jax.Array]:
        inputs = train[indices]
        key = jax.random.fold_in(jax.random.key(problem.seed), update)
        return optimizer.step(params, state, (inputs, inputs), key)

    began = time.perf_counter()
    jitted = jax.jit(train_step, donate_argnums=(0, 1))
    rows = np.zeros(problem.batch_size, np.int32)
    lowered = jitted.lower(position.params, position.state, problem.train, rows, np.int32(0))
    compiled = lowered.compile()
    return compiled, time.perf_counter() - began


class StopRequest:
    """Made by Ctrl-C; whoever trains looks at it between updates."""

    def __init__(self) -> None:
        self.made = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turns the first Ctrl-C into a request; a second one interrupts as usual.

        An exception would lose the buffers that a step has just taken, and one that is raised
        while XLA compiles ends in a segmentation fault when Python exits (jaxlib 0.10.2).
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signal handlers
            return
        before = signal.getsignal(signal.SIGINT)

        def request(*_: Any) -> None:
            self.made = True
            signal.signal(signal.SIGINT, before)
            # Not print: it may be what the signal has interrupted.
            os.write(STDERR, b"\nstopping after this step (Ctrl-C again: at once)\n")

        signal.signal(signal.SIGINT, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Training:
    """One optimizer's run, from ``position`` to the end of ``schedule``."""

    def __init__(
        self,
        problem: Problem,
        step: TrainStep,
        schedule: Schedule,
        position: Position,
        stop: StopRequest,
    ) -> None:
        self.problem, self.step, self.schedule = problem, step, schedule
        self.position, self.stop = position, stop
        self.batches = Batches(len(problem.train), problem.batch_size, problem.seed)

    def run(self, metrics: Metrics, checkpoints: Checkpoints, progress: Progress) -> str:
        """Trains; returns "finished", "interrupted" or "diverged"."""
        position, schedule, saved_at = self.position, self.schedule, time.monotonic()
        if not metrics.rows:
            metrics.add(self._measure(None, test=True))
        while position.update < schedule.updates and not self.stop.made:
            deadline = math.inf if schedule.checkpoint_every else saved_at + CHECKPOINT_SECONDS
            loss = self._advance(schedule.next_pause(position.update), deadline, progress)
            if not position.usable():
                return "interrupted"
            if self._measurement_due(metrics):
                metrics.add(self._measure(loss, self._test_due()))
                if not math.isfinite(metrics.rows[-1]["train_loss"] or 0.0):
                    return "diverged"
            if self._checkpoint_due(deadline):
                checkpoints.save(position.update, position.arrays(), position.numbers())
                saved_at = time.monotonic()
        checkpoints.save(position.update, position.arrays(), position.numbers())
        return "finished" if position.update == schedule.updates else "interrupted"

    def _advance(self, pause: int, deadline: float, progress: Progress) -> float | None:
        """Makes updates until one of the limits; returns the loss on the last one's batch."""
        position, began, before = self.position, time.perf_counter(), self.position.seconds
        loss: jax.Array | None = None
        try:
            while position.update < pause and time.monotonic() < deadline and not self.stop.made:
                rows, update = self.batches.indices(position.update), np.int32(position.update)
                previous = loss
                position.params, position.state, loss = self.step(
                    position.params, position.state, self.problem.train, rows, update
                )
                position.update += 1
                if previous is not None:  # to wait for the one before keeps the device busy
                    progress.show(position.update - 1, float(previous))
        except KeyboardInterrupt:  # where no handler could be set
            self.stop.made = True
        if position.usable():
            jax.block_until_ready((position.params, position.state))
        position.seconds = before + time.perf_counter() - began
        if loss is None:
            return None
        progress.show(position.update, float(loss))
        return float(loss)

    def _measure(self, batch_loss: float | None, test: bool) -> Row:
        """A row of metrics: without the regularization, except for the loss on the batch."""
        position, problem = self.position, self.problem
        params = evaluated_params(position.params, position.state)
        train_loss = problem.mean_loss(params, problem.evaluated_train)
        test_loss = problem.mean_loss(params, problem.evaluated_test) if test else None
        return {
            "update": position.update,
            "seconds": round(position.seconds, 6),
            "batch_loss": batch_loss,
            "train_loss": float(train_loss),
            "test_loss": None if test_loss is None else float(test_loss),
            **state_metrics(position.state),
        }

    def _last(self) -> bool:
        return self.stop.made or self.position.update == self.schedule.updates

    def _measurement_due(self, metrics: Metrics) -> bool:
        if metrics.rows and metrics.rows[-1]["update"] == self.position.update:
            return False  # stopped before another update was made
        return self._last() or self.position.update % self.schedule.eval_every == 0

    def _test_due(self) -> bool:
        return self._last() or self.position.update % (TEST_EVERY * self.schedule.eval_every) == 0

    def _checkpoint_due(self, deadline: float) -> bool:
        if self.schedule.checkpoint_every:
            return self.position.update % self.schedule.checkpoint_every == 0
        return time.monotonic() >= deadline


def time_sgd_step(problem: Problem) -> float:
    """The median time of an SGD step, in seconds: the unit that updates are measured in."""
    optimizer = first_order("sgd", problem.objective, default_learning_rate("sgd"))
    position = start(problem, optimizer)
    step, _ = compile_step(problem, optimizer, position)
    rows = np.arange(problem.batch_size, dtype=np.int32)
    params, state, times = position.params, position.state, []
    for update in range(YARDSTICK_STEPS + 3):
        began = time.perf_counter()
        params, state, loss = step(params, state, problem.train, rows, np.int32(update))
        jax.block_until_ready((params, loss))
        times.append(time.perf_counter() - began)
    return statistics.median(times[-YARDSTICK_STEPS:])
