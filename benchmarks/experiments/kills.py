"""``python -m benchmarks kills``: a training that is killed at random moments, and what it lost.

KFRA trains a small autoencoder on the digits in a process of its own, which ends by SIGKILL so many
seconds after its first update, and goes on from its last checkpoint, until it has been killed often
enough. Then it ends, and its losses are compared with those of a training that nothing stopped.
"""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import BenchmarkError
from benchmarks.experiments import autoencoder
from benchmarks.harness.arguments import options, positive_int, positive_number
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment

TASK = ["--data", "digits", "--layers", "8", "--batch-size", "100", "--optimizer", "kfra"]
LOSSES = ("batch_loss", "train_loss")
#: Unused files of a checkpoint that was being written.
UNFINISHED = "*.orbax-checkpoint-tmp*"
PATIENCE = 300.0  # seconds until a training's first update, or its end


class Kill(NamedTuple):
    """One session, and how it was ended."""

    seconds: float  # from its first update on
    update: int  # the last on record
    writing: bool  # whether a checkpoint was half written
    resumed: int  # the update of the last whole checkpoint, from which the next session goes on

    @property
    def lost(self) -> int:
        """Updates to be done again."""
        return self.update - self.resumed


def main(arguments: Sequence[str]) -> None:
    """Kills, goes on, compares, and writes everything down."""
    parser = options("kills", __doc__)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="how many (20)")
    add(
        "--longest",
        type=positive_number,
        default=0.4,
        help="seconds a session trains at most (0.4)",
    )
    add("--checkpoint-every", type=positive_int, default=5, help="updates between checkpoints (5)")
    given = parser.parse_args(arguments)
    with experiment("kills", arguments, given, given.kills + 1) as run:
        folder = given.out / "runs"
        killed = _Training(folder / "killed", given)
        random = np.random.default_rng(given.seed)
        kills = []
        for _ in range(given.kills):
            kills.append(killed.until_killed(float(random.uniform(0, given.longest))))
            run.tick(f"{kills[-1].lost} updates lost")
        updates = killed.last_update() + given.checkpoint_every
        killed.to_its_end(updates)
        alone = _Training(folder / "alone", given)
        alone.to_its_end(updates)
        run.tick()
        same = killed.losses() == alone.losses()
        measured = {
            "kills": [{**k._asdict(), "lost": k.lost} for k in kills],
            "updates": updates,
            "same_as_without": same,
        }
        run.record(measured, [_table(kills, updates, same)], {"kills": _plot(kills)})
    if not same or any(k.lost > given.checkpoint_every for k in kills):
        raise BenchmarkError("a kill has cost more than the updates since the last checkpoint")


class _Training:
    """A run of the autoencoder, in a folder of its own."""

    def __init__(self, out: Path, given: Any) -> None:
        self.out, self.seed, self.every = out, given.seed, given.checkpoint_every
        if out.exists():
            raise BenchmarkError(f"{out} holds an earlier training; remove it, or choose --out")

    def until_killed(self, seconds: float) -> Kill:
        """One session, killed so long after its first update."""
        before, began, process = self._written(), self._checkpoint(), self._start()
        try:
            self._wait(process, lambda: self._written() > before and self.last_update() > began)
            time.sleep(seconds)
        finally:
            process.kill()
            process.wait()
        writing = any(self.out.rglob(UNFINISHED))
        return Kill(round(seconds, 3), self.last_update(), writing, self._checkpoint())

    def to_its_end(self, updates: int) -> None:
        """The last session, in this process."""
        with Path(f"{self.out}.txt").open("a") as said, contextlib.redirect_stdout(said):
            autoencoder.main(self._command(updates))

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks", "autoencoder", *self._command(10**6)]
        with Path(f"{self.out}.txt").open("ab") as said:
            return subprocess.Popen(command, stdout=said, stderr=said)

    def _command(self, updates: int) -> list[str]:
        self.out.mkdir(parents=True, exist_ok=True)
        given = [*TASK, "--out", str(self.out), "--updates", str(updates), "--seed", str(self.seed)]
        given += ["--eval-every", "1", "--checkpoint-every", str(self.every), "--no-sgd-yardstick"]
        return given + ["--resume"] * any(self.out.glob("*-001"))

    def _wait(self, process: subprocess.Popen[bytes], holds: Any) -> None:
        until = time.monotonic() + PATIENCE
        while not holds():
            if process.poll() is not None and not holds():
                raise BenchmarkError(f"the training in {self.out} has ended: see {self.out}.txt")
            if time.monotonic() > until:
                raise BenchmarkError(f"the training in {self.out} takes too long")
            time.sleep(0.01)

    def _checkpoint(self) -> int:
        """The last update that has a checkpoint, 0 for none."""
        kept = self.out.glob("*-001/kfra/checkpoints/*")
        return max((int(path.name) for path in kept if path.name.isdecimal()), default=0)

    def _rows(self) -> list[dict[str, str]]:
        found = list(self.out.glob("*-001/kfra/metrics.csv"))
        if not found:
            return []
        with found[0].open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def _written(self) -> int:
        """When there was something to be put on record last."""
        return max(
            (x.stat().st_mtime_ns for x in self.out.glob("*-001/kfra/metrics.csv")), default=0
        )

    def last_update(self) -> int:
        """The last update on record."""
        return max((int(row["update"]) for row in self._rows()), default=0)

    def losses(self) -> list[tuple[str, ...]]:
        """Every update with its losses, to the last bit."""
        return [(row["update"], *(row[name] for name in LOSSES)) for row in self._rows()]


def _table(kills: list[Kill], updates: int, same: bool) -> Table:
    lines = [
        [str(i), f"{k.seconds:.2f}", str(k.update), "yes" if k.writing else "no", str(k.resumed),
         str(k.lost)]
        for i, k in enumerate(kills, 1)
    ]  # fmt: skip
    head = ["kill", "seconds", "at update", "in a checkpoint", "went on from", "lost"]
    said = "the same, bit by bit, as" if same else "NOT those of"
    return table(f"{updates} updates, whose losses are {said} a run without kills", head, lines)


def _plot(kills: list[Kill]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, len(kills) + 1), [k.lost for k in kills])
    axes.set(xlabel="kill", ylabel="updates to be done again")
    return figure
