"""Trains settings on one task, those of a method side by side where that is asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.experiments.grid.settings import (
    Setting,
    all_at_once,
    first_order_optimizer,
    first_order_step,
    second_order_optimizer,
)
from benchmarks.harness import race
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.tasks import Task

EVALUATIONS = 30  # of every training
TIMED = 40  # updates, of one setting where many train side by side

Found = dict[Setting, list[race.Point]]


class Trainer:
    """One task with the numbers of updates, and the experiment that keeps what is done.

    Args:
      task: the data set's.
      updates: of first-order methods.
      second_order_updates: of the others.
      run: whose ledger is read before and written after every training.
      identity: what runs depend on beside the task, the setting, the seed and the updates.
    """

    def __init__(
        self,
        task: Task,
        updates: int,
        second_order_updates: int,
        run: Experiment,
        identity: dict[str, Any],
    ) -> None:
        self.task, self.updates = task, updates
        self.second_order_updates = second_order_updates
        self.run, self.identity = run, identity
        # One program for all settings of a method, and one for all seeds of a setting.
        self._step = functools.cache(lambda method: first_order_step(method, task.objective))
        self._made = functools.cache(
            lambda setting: second_order_optimizer(
                setting, task.objective, task.start(0), task.example_batch
            )
        )

    def second_order(self, setting: Setting, seed: int) -> Found:
        """One run of KFRA or KFAC."""
        key = self._key(setting, seed, self.second_order_updates)
        start, updates = self.task.start(seed), self.second_order_updates
        found = self.run.measure(
            key, lambda: self._train(self._made(setting), start, seed, updates)
        )
        return {setting: race.points(found)}

    def first_order(self, group: Sequence[Setting], seed: int) -> Found:
        """Runs of settings of one method: those that are not in the ledger, at once."""
        keys = {setting: self._key(setting, seed, self.updates) for setting in group}
        found = {setting: self.run.find(key) for setting, key in keys.items()}
        missing = [setting for setting, points in found.items() if points is None]
        if missing:
            trained = self._alone if len(missing) == 1 else self._side_by_side
            for setting, points in zip(missing, trained(missing, seed), strict=True):
                found[setting] = self.run.add(keys[setting], points)
        return {setting: race.points(points or ()) for setting, points in found.items()}

    def _alone(self, group: Sequence[Setting], seed: int) -> list[list[race.Point]]:
        made = first_order_optimizer(group[0], self._step(group[0].method), self.updates)
        return [self._train(made, self.task.start(seed), seed, self.updates)]

    def _side_by_side(self, group: Sequence[Setting], seed: int) -> list[list[race.Point]]:
        """Many settings in one program; seconds are those of one setting that trains alone."""
        params, step = self.task.start(seed), self._step(group[0].method)
        alone = first_order_optimizer(group[0], step, self.updates)
        timed = self._train(alone, params, seed, min(TIMED, self.updates))[-1]
        each = timed.seconds / timed.update
        many = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(group), *a.shape)), params)
        evaluate = jax.jit(lambda p: jax.lax.map(self.task.evaluate, p))
        made = all_at_once(group, step, self.updates)
        points = self._train(made, many, seed, self.updates, evaluate)
        return [
            [race.Point(p.update, each * p.update, p.loss[k]) for p in points]
            for k in range(len(group))
        ]

    def _train(
        self,
        optimizer: Any,
        params: Any,
        seed: int,
        updates: int,
        evaluate: Callable[[Any], Any] | None = None,
    ) -> list[race.Point]:
        every = max(1, updates // EVALUATIONS)
        batches, loss = self.task.batches(seed), evaluate or self.task.evaluate
        points, _ = race.run(optimizer, params, batches, loss, updates, every, seed)
        return [p._replace(loss=_lost_is_infinite(p.loss)) for p in points]

    def _key(self, setting: Setting, seed: int, updates: int) -> dict[str, Any]:
        own = {"data": self.task.dataset.name, "seed": seed, "updates": updates}
        return {**own, **setting._asdict(), **self.identity}


def _lost_is_infinite(loss: Any) -> Any:
    """What is not a number is worse than any that is."""
    return np.nan_to_num(np.asarray(loss), nan=math.inf, posinf=math.inf).tolist()
