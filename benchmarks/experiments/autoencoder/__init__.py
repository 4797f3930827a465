"""``python -m benchmarks autoencoder``: the paper's deep autoencoder by one optimizer or several.

Without --optimizer and --compare it trains a short while by KFRA and by Adam, from the same start
on the same batches. Every run has a new folder under --out with its losses (metrics.csv),
settings, checkpoint, table and plots. Ctrl-C ends it after a step, and --resume goes on from there
to the same numbers.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import kfgn
from benchmarks import BenchmarkError
from benchmarks.experiments.autoencoder import report
from benchmarks.experiments.autoencoder.training import (
    COLUMNS,
    Position,
    Result,
    Schedule,
    Training,
)
from benchmarks.harness import runs, tasks, timing
from benchmarks.harness.arguments import (
    number,
    one_of,
    option,
    options,
    positive_int,
    positive_number,
    some_of,
    widths,
)
from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.display import make_console
from benchmarks.harness.models import ENCODER
from benchmarks.harness.optimizers import (
    NAMES,
    SECOND_ORDER,
    Optimizer,
    check_options,
    default_learning_rate,
    evaluated_params,
    first_order,
    second_order,
)
from benchmarks.harness.record import environment, write_json

NAME = "autoencoder"
SHORT = ("kfra", "adam")  # what is trained where no optimizer is named
# Updates where --updates says nothing. One of second order costs about five gradient steps, so
# these take similar times: minutes on two CPU cores.
UPDATES = {"second order": 800, "first order": 4000}
SHORT_UPDATES = {"second order": 150, "first order": 450}
# About so many in a run, unless --eval-every says otherwise.
EVALUATIONS, SHORT_EVALUATIONS = 100, 20


def main(arguments: Sequence[str]) -> None:
    """Trains and reports."""
    given = _parse(arguments)
    try:
        experiment = Experiment(given, make_console())
        try:
            experiment.train()
        finally:  # whatever ended the training, what there is of it is shown
            experiment.report()
    except kfgn.errors.KfgnError as error:
        raise BenchmarkError(str(error)) from error
    if problems := experiment.folder.problems:
        raise BenchmarkError(problems[0])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options(NAME, __doc__, resumable=True, out=Path("runs"))
    add = parser.add_argument
    add("--data", default="curves", help="curves, mnist, faces, digits or fashion_mnist (curves)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--optimizer", type=one_of("optimizer", NAMES), help=f"one of {', '.join(NAMES)}"
    )
    which.add_argument(
        "--compare", type=some_of("optimizer", NAMES), help="several, as in kfra,kfac (kfra,adam)"
    )
    add("--updates", type=positive_int, help="how long to train (minutes on two CPU cores)")
    add("--batch-size", type=positive_int, default=1000, help="images per update (1000)")
    add("--learning-rate", type=positive_number, help="for the first-order optimizers")
    add("--decay-period", type=positive_int, help="halve the learning rate every so many updates")
    more = "passed to kfgn's optimizer; may be repeated"
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help=more)
    add("--l2", type=number, default=1e-5, help="weight of the L2 regularization (1e-5)")
    add("--layers", type=widths, default=ENCODER, help="widths of the encoder (1000,500,250,30)")
    add("--eval-every", type=positive_int, help="updates between evaluations (about 100 in all)")
    add("--checkpoint-every", type=positive_int, help="updates between checkpoints (each minute)")
    add("--references", type=Path, help="plot the loss curves of this folder's csv files, too")
    add("--no-sgd-yardstick", action="store_true", help="do not time an SGD step to compare with")
    given = parser.parse_args(arguments)
    given.short = given.optimizer is None and given.compare is None
    given.optimizers = given.compare or ((given.optimizer,) if given.optimizer else SHORT)
    given.option = dict(given.option)
    if given.references is not None and not given.references.is_dir():
        raise BenchmarkError(f"--references must be a folder, found {given.references}")
    second = [name in SECOND_ORDER for name in given.optimizers]
    if given.option and not any(second):
        raise BenchmarkError("--option is for kfra, kflr and kfac; none of them is to be run")
    if (given.learning_rate or given.decay_period) and all(second):
        raise BenchmarkError(
            "--learning-rate and --decay-period are for the first-order optimizers; "
            f"{' and '.join(given.optimizers)} need neither (see --option)"
        )
    return given


class Prepared(NamedTuple):
    """An optimizer, how long it trains, and all that its numbers depend on."""

    optimizer: Optimizer
    schedule: Schedule
    settings: dict[str, Any]  # what must not change when it is resumed


def _prepare(name: str, given: argparse.Namespace, task: tasks.Task, checksum: int) -> Prepared:
    second, rate = name in SECOND_ORDER, None
    if second:
        example = name, task.objective, task.start(given.seed), task.example_batch, given.option
        if given.option:
            check_options(*example)
        optimizer = second_order(*example)
    else:
        rate = default_learning_rate(name, given.learning_rate)
        optimizer = first_order(name, task.objective, rate, given.decay_period)
    usual, looks = (SHORT_UPDATES, SHORT_EVALUATIONS) if given.short else (UPDATES, EVALUATIONS)
    updates = given.updates or usual["second order" if second else "first order"]
    every = given.eval_every or max(1, updates // looks)
    own = {key: getattr(given, key) for key in ("data", "batch_size", "l2", "layers", "seed")}
    own |= {"data_checksum": checksum, "optimizer": name, "learning_rate": rate}
    own |= {"options": given.option if second else {}}
    own |= {"decay_period": None if second else given.decay_period}
    return Prepared(optimizer, Schedule(updates, every, given.checkpoint_every), own)


class Experiment:
    """The runs of one command: the task they share, their folder, and what they gave."""

    def __init__(self, given: argparse.Namespace, console: Console) -> None:
        self.given, self.console = given, console
        runs.check_writable(given.out)
        self.task = tasks.autoencoder(
            given.data, given.data_dir, given.layers, given.batch_size, given.l2
        )
        checksum = zlib.crc32(np.ascontiguousarray(self.task.images).data)
        self.prepared = [_prepare(n, given, self.task, checksum) for n in given.optimizers]
        runs.check_writable(given.out, self._checkpoint_bytes())
        self.folder = runs.RunFolder(self._find_folder())
        self.results: list[Result] = []
        self.sgd_seconds: float | None = None

    def _checkpoint_bytes(self) -> int:
        """About the room that checkpoints need: each run keeps two while it writes the next."""
        params, total = self.task.start(self.given.seed), 0
        for optimizer, _, _ in self.prepared:
            kept = (params, jax.eval_shape(optimizer.init, params))
            total += 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
        return total + 2**24

    def _find_folder(self) -> Path:
        name = f"{self.given.data}-{'+'.join(self.given.optimizers)}"
        if not self.given.resume:
            return runs.new_run(self.given.out, name)
        folder = runs.latest_run(self.given.out, name)
        for optimizer, _, settings in self.prepared:
            stored = folder / optimizer.name / "settings.json"
            if stored.exists():  # in a comparison, the later ones may not have begun
                runs.check_same(stored, settings)
        return folder

    def train(self) -> None:
        """Runs one optimizer after the other."""
        self.say(f"{self.task.dataset.description}\nrun folder: {self.folder.path}")
        if not self.given.no_sgd_yardstick:
            self.sgd_seconds = time_sgd_step(self.task, self.given.seed)
        for prepared in self.prepared:
            # Listed before it is trained: wherever it ends, its rows are to be shown.
            self.results.append(Result(prepared.optimizer.name, "interrupted", [], None))
            self._train_one(*prepared, self.results[-1])

    def _train_one(
        self, optimizer: Optimizer, schedule: Schedule, settings: dict[str, Any], result: Result
    ) -> None:
        name, position = optimizer.name, start(self.task, optimizer, self.given.seed)
        checkpoint = Checkpoint(self.folder, f"{name}/checkpoints")
        self._restore(name, position, checkpoint, result)
        record = self._record(name, settings, schedule, position.update)
        session = record["sessions"][-1]
        result.outcome = "finished"
        if position.update < schedule.updates:
            self.say(f"{name}: compiling")
            step, session["compile_seconds"] = compile_step(self.task, optimizer, position)
            self._write(name, record)
            training = Training(self.task, step, schedule, position, self.given.seed)
            with runs.Metrics(self.folder, f"{name}/metrics.csv", COLUMNS, result.rows) as metrics:
                result.outcome = training.run(metrics, checkpoint, self.console, name)
        if position.usable():
            result.params = evaluated_params(position.params, position.state)
        session["outcome"] = result.outcome
        self._write(name, record)
        if result.outcome == "interrupted":
            self.say("interrupted: the same command with --resume goes on from here")
            raise KeyboardInterrupt

    def _restore(
        self, name: str, position: Position, checkpoint: Checkpoint, result: Result
    ) -> None:
        """Moves `position` to the latest checkpoint, and reads the rows measured until then."""
        found = checkpoint.restore(position.arrays()) if self.given.resume else None
        if found is None:
            return
        position.update, position.seconds, (position.params, position.state) = found
        self.say(f"{name}: continues from update {position.update}")
        rows = runs.read_rows(self.folder.path / name / "metrics.csv")
        result.rows += [row for row in rows if (row["update"] or 0) <= position.update]

    def _record(
        self, name: str, settings: dict[str, Any], schedule: Schedule, update: int
    ) -> dict[str, Any]:
        """What settings.json says: the settings, and every session that trained with them."""
        session = {"from_update": update, "sgd_step_seconds": self.sgd_seconds, **environment()}
        stored = self.folder.path / name / "settings.json"
        earlier = runs.read_settings(stored)["sessions"] if update else []
        said = {"settings": settings, "schedule": schedule._asdict()}
        return {**said, "sessions": [*earlier, session]}

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.folder.write(f"{name}/settings.json", lambda path: write_json(path, record))

    def say(self, text: str) -> None:
        """Prints plain text."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def report(self) -> None:
        """Shows and keeps the table and the plots of whatever was measured."""
        results = [result for result in self.results if result.rows]
        if results:
            folder, given = self.folder, self.given
            report.write(
                folder, results, self.task, given.references, self.sgd_seconds, self.console
            )
            self.say(f"table.txt, losses.png and reconstructions.png are in {folder.path}")


def start(task: tasks.Task, optimizer: Optimizer, seed: int) -> Position:
    """The position before the first update."""
    # Copied, because the steps write over these buffers: the next optimizer starts there too, and
    # a state may begin as the parameters themselves.
    params = jax.tree.map(jnp.copy, task.start(seed))
    return Position(params, jax.tree.map(jnp.copy, optimizer.init(params)))


def compile_step(task: tasks.Task, optimizer: Optimizer, position: Position) -> tuple[Any, float]:
    """Compiles one update; also returns the seconds it took."""
    key = jax.random.key(0)
    example = position.params, position.state, task.example_batch, key
    return timing.compiled(optimizer.step, *example, donate_argnums=(0, 1))[:2]


def time_sgd_step(task: tasks.Task, seed: int) -> float:
    """The time of an SGD step, in seconds: the unit that updates are measured in."""
    sgd = first_order("sgd", task.objective, default_learning_rate("sgd"))
    params, key = task.start(seed), jax.random.key(seed)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        return sgd.step(params, state, batch, key)[:2]

    carry = params, sgd.init(params)
    return timing.timed_updates(step, carry, task.example_batch, blocks=1).median
