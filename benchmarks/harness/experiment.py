"""One run of a command: how far it is, what it has measured, and the record that it leaves.

A command is a module of `benchmarks.experiments` with a function `main(arguments)`. It leaves a
folder with `results.json` (the command, its settings, the machine and what was measured),
`table.txt` and plots.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.harness.arguments import settings
from benchmarks.harness.display import Ticker, make_console, progress, write_tables
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.record import environment, heading, save_figure, write_json, writing


class Experiment:
    """What a command's `main` works with; `experiment` makes one."""

    ticker: Ticker  # where `experiment` was told a total

    def __init__(
        self, name: str, arguments: Sequence[str], given: argparse.Namespace, ledger: Ledger
    ) -> None:
        self.name, self.arguments, self.given = name, arguments, given
        self.console = make_console()
        self.measure, self.find, self.add = ledger.measure, ledger.find, ledger.add

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Ticker]:
        """Shows how much of `total` is done."""
        with progress(self.console, name, total) as ticker:
            yield ticker

    def tick(self, figures: str = "") -> None:
        """One more of the total is done."""
        self.ticker.step(figures)

    def record(
        self,
        measured: Any,
        tables: Sequence[Table],
        figures: Mapping[str, Figure],
        more: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        """Prints the tables, and writes them, the figures and everything measured to --out.

        Args:
          measured: numbers, texts, lists and dictionaries of them.
          tables: printed unless `quiet`.
          figures: by the names of their files, without ".png".
          more: settings beside the options; those of the same name replace them.
        """
        folder = self.given.out
        said = {**settings(self.given), **(more or {})}
        report = {**heading(self.name, self.arguments), "settings": said}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "results.json", report, measured=measured)
            write_tables(folder / "table.txt", tables)
            for name, figure in figures.items():
                save_figure(folder / f"{name}.png", figure)
        if not quiet:
            for shown in tables:
                self.console.print(shown)
            self.console.print(f"written to {folder}")


@contextmanager
def experiment(
    name: str, arguments: Sequence[str], given: argparse.Namespace, total: int = 0
) -> Iterator[Experiment]:
    """An experiment with its ledger, where it has --resume, and a bar for `total`, if any."""
    here = environment()
    del here["date"]
    resume: bool | None = getattr(given, "resume", None)
    path = None if resume is None else given.out / "measured.jsonl"
    with Ledger(path, bool(resume), here) as ledger:
        found = Experiment(name, arguments, given, ledger)
        if not total:
            yield found
            return
        with found.progress(name, total) as found.ticker:
            yield found
