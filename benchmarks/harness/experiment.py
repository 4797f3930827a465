"""One run of a command: how far it is, what it has measured, and the record that it leaves.

A command is a module of `benchmarks.experiments` with a function `main(arguments)`. It leaves a
folder with `results.json` (the command, its settings, the machine and what was measured),
`table.txt` and plots.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import kfgn
from benchmarks import BenchmarkError
from benchmarks.harness import arguments as command_line
from benchmarks.harness.display import Ticker, progress, write_tables
from benchmarks.harness.ledger import Ledger


class Experiment:
    """What a command's `main` works with; `experiment` makes one."""

    def __init__(
        self, name: str, arguments: Sequence[str], given: argparse.Namespace, ledger: Ledger | None
    ) -> None:
        self.name, self.arguments, self.given = name, arguments, given
        self.console, self.ledger = Console(), ledger
        self.ticker: Ticker | None = None

    def progress(self, name: str, total: int) -> AbstractContextManager[Ticker]:
        """Shows how much of `total` is done."""
        return progress(self.console, name, total)

    def tick(self, figures: str = "") -> None:
        """One more of the `total` that `experiment` was told is done."""
        assert self.ticker is not None
        self.ticker.step(figures)

    def expect(self, more: int) -> None:
        """So many more than that."""
        assert self.ticker is not None
        self.ticker.expect(more)

    def measure(self, what: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """As `Ledger.measure`."""
        assert self.ledger is not None
        return self.ledger.measure(what, measure)

    def find(self, what: Mapping[str, Any]) -> Any | None:
        """As `Ledger.find`."""
        assert self.ledger is not None
        return self.ledger.find(what)

    def add(self, what: Mapping[str, Any], measured: Any) -> Any:
        """As `Ledger.add`."""
        assert self.ledger is not None
        return self.ledger.add(what, measured)

    def record(
        self,
        measured: Any,
        tables: Sequence[Table],
        figures: Mapping[str, Figure],
        settings: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        """Prints the tables, and writes them, the figures and everything measured to --out.

        Args:
          measured: numbers, texts, lists and dictionaries of them.
          tables: printed unless `quiet`.
          figures: by the names of their files, without ".png".
          settings: beside the options; those of the same name replace them.
        """
        folder = self.given.out
        said = {**command_line.settings(self.given), **(settings or {})}
        report = {**heading(self.name, self.arguments), "settings": said}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "results.json", {**report, "measured": measured})
            write_tables(folder / "table.txt", tables)
            for name, figure in figures.items():
                figure.savefig(folder / f"{name}.png", dpi=130)
        if not quiet:
            for shown in tables:
                self.console.print(shown)
            self.console.print(f"written to {folder}")


@contextmanager
def experiment(
    name: str, arguments: Sequence[str], given: argparse.Namespace, total: int = 0
) -> Iterator[Experiment]:
    """An experiment with its ledger, where it has --resume, and a bar for `total`, if any."""
    if not hasattr(given, "resume"):
        found = Experiment(name, arguments, given, None)
        yield from _shown(found, total)
        return
    here = environment()
    del here["date"]
    with Ledger(given.out / "measured.jsonl", given.resume, here) as ledger:
        yield from _shown(Experiment(name, arguments, given, ledger), total)


def _shown(found: Experiment, total: int) -> Iterator[Experiment]:
    if not total:
        yield found
        return
    with found.progress(found.name, total) as found.ticker:
        yield found


def heading(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every record begins with: the command that measures the same again, and where it ran."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--data-dir"):
            next(rest, None)
        elif argument != "--resume" and not argument.startswith(("--out=", "--data-dir=")):
            kept.append(argument)
    return {"command": " ".join(["python -m benchmarks", name, *kept]), **environment()}


def environment() -> dict[str, Any]:
    """What a result should be read with."""
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "kfgn": kfgn.__version__,
    }


def cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says in one line that results cannot be written."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"cannot write results to {place}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes it so that a reader never sees half a file."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def _finite(measured: Any) -> Any:
    """The same with null for what JSON cannot say: a number that is not finite."""
    if isinstance(measured, Mapping):
        return {key: _finite(value) for key, value in measured.items()}
    if isinstance(measured, (list, tuple)):
        return [_finite(value) for value in measured]
    return None if isinstance(measured, float) and not math.isfinite(measured) else measured
