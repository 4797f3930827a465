"""The training loop of one optimizer: evaluated, checkpointed, and ended by Ctrl-C without loss."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from rich.console import Console

from benchmarks.harness import interrupt, race
from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.display import progress
from benchmarks.harness.optimizers import STATE_METRICS, evaluated_params, state_metrics
from benchmarks.harness.runs import Metrics, Row
from benchmarks.harness.tasks import EVALUATED, Task

CHECKPOINT_SECONDS = 60.0  # between checkpoints, when they go by the clock
TEST_EVERY = 10  # evaluations of the training loss to one of the test loss
COLUMNS = ("update", "seconds", "batch_loss", "train_loss", "test_loss", *STATE_METRICS)


class Schedule(NamedTuple):
    """When to stop, evaluate and save. Of no influence on the numbers."""

    updates: int
    eval_every: int
    checkpoint_every: int | None = None  # None: by the clock


@dataclass
class Position:
    """How far a run has come: all that a resumed run needs."""

    params: Any
    state: Any
    update: int = 0
    seconds: float = 0.0

    def usable(self) -> bool:
        """False if a step was stopped between taking these buffers and returning new ones."""
        return not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.arrays()))

    def arrays(self) -> tuple[Any, Any]:
        """What a checkpoint keeps as arrays."""
        return self.params, self.state


@dataclass
class Result:
    """What one optimizer's run gave; ``params`` is None if it was cut off before they were safe."""

    name: str
    outcome: str  # "finished", "interrupted" or "diverged"
    rows: list[Row]
    params: Any


class Training:
    """One optimizer's run, from ``position`` to the end of ``schedule``."""

    def __init__(
        self, task: Task, step: Any, schedule: Schedule, position: Position, seed: int
    ) -> None:
        self.task, self.step, self.schedule = task, step, schedule
        self.position, self.seed = position, seed
        self.evaluated_test = jax.device_put(task.dataset.test[:EVALUATED])

    def run(self, metrics: Metrics, checkpoint: Checkpoint, console: Console, name: str) -> str:
        """Trains; returns "finished", "interrupted" or "diverged"."""
        position, schedule = self.position, self.schedule
        if not metrics.rows:
            metrics.add(self._measure(None, test=True))
        loss, outcome = None, "finished"
        try:
            with progress(console, name, schedule.updates, position.update) as ticker:
                saved_at = time.monotonic()
                for at in self._steps():
                    position.update, position.seconds = at.update, at.seconds
                    position.params, position.state, loss = at.params, at.state, float(at.value)
                    ticker.step(f"loss {loss:.4g}")
                    if self._is_last() or at.update % schedule.eval_every == 0:
                        metrics.add(self._measure(loss, self._is_test_due()))
                        if not math.isfinite(metrics.rows[-1]["train_loss"] or 0.0):
                            return "diverged"
                    if self._is_checkpoint_due(saved_at):
                        checkpoint.save(at.update, at.seconds, position.arrays())
                        saved_at = time.monotonic()
        except KeyboardInterrupt:
            outcome = "interrupted"
            if not position.usable():
                return outcome
            if metrics.rows[-1]["update"] != position.update:
                metrics.add(self._measure(loss, test=True))
        checkpoint.save(position.update, position.seconds, position.arrays())
        return outcome

    def _steps(self) -> Any:
        at = self.position
        data = self.task.batches(self.seed, start=at.update)
        return race.timed_steps(
            self.step, at.params, at.state, data, self.seed, self.schedule.updates,
            after=(at.update, at.seconds),
        )  # fmt: skip

    def _measure(self, batch_loss: float | None, test: bool) -> Row:
        """A row of metrics: without the regularization, except for the loss on the batch."""
        position, task = self.position, self.task
        params = evaluated_params(position.params, position.state)
        return {
            "update": position.update,
            "seconds": round(position.seconds, 6),
            "batch_loss": batch_loss,
            "train_loss": float(task.evaluate(params)),
            "test_loss": float(task.mean_loss(params, self.evaluated_test)) if test else None,
            **state_metrics(position.state),
        }

    def _is_last(self) -> bool:
        return interrupt.asked() or self.position.update == self.schedule.updates

    def _is_test_due(self) -> bool:
        every = TEST_EVERY * self.schedule.eval_every
        return self._is_last() or self.position.update % every == 0

    def _is_checkpoint_due(self, saved_at: float) -> bool:
        if self.schedule.checkpoint_every:
            return self.position.update % self.schedule.checkpoint_every == 0
        return time.monotonic() >= saved_at + CHECKPOINT_SECONDS
