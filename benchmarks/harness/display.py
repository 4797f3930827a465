"""What a run shows on the terminal: its progress, and a table at the end."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from benchmarks.harness.runs import Result

LINE_SECONDS = 10.0  # between the lines that stand in for a progress bar


class Progress:
    """A progress bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, console: Console, name: str, updates: int, first: int) -> None:
        self.console, self.name, self.updates = console, name, updates
        self._origin: tuple[int, float] | None = None
        self._last_line = -math.inf
        figures = TextColumn("{task.fields[figures]}")
        self._bar = Bar(
            TextColumn(name), BarColumn(), MofNCompleteColumn(), figures, console=console
        )
        self._task = self._bar.add_task("", total=updates, completed=first, figures="")

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, update: int, loss: float) -> None:
        """Shows where training is, how fast it goes, evaluations and all, and how long it takes."""
        now = time.monotonic()
        if self._origin is None:  # what came before was compilation
            self._origin = update, now
        first, began = self._origin
        figures = f"loss {loss:.4g}"
        if update > first:
            rate = (update - first) / max(now - began, 1e-9)
            left = int((self.updates - update) / rate)
            figures += f"  {rate:.3g} updates/s  {left // 60}:{left % 60:02} left"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=update, figures=figures)
        elif now - self._last_line >= LINE_SECONDS or update == self.updates:
            self._last_line = now
            line = f"{self.name}  {update}/{self.updates}  {figures}"
            self.console.print(line, highlight=False, soft_wrap=True)


def table(results: Sequence[Result], sgd_seconds: float | None) -> Table:
    """Cost and outcome of every optimizer; ``sgd_seconds`` is the time of one SGD step."""
    columns = ["optimizer", "updates", "seconds", "s/update", "SGD steps", "train", "test"]
    shown = Table(*columns, box=box.SIMPLE, title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    for result in results:
        latest = result.rows[-1]
        updates, seconds = latest["update"] or 0, latest["seconds"] or 0.0
        each = seconds / updates if updates else None
        ratio = each / sgd_seconds if each and sgd_seconds else None
        finished = result.outcome == "finished"
        shown.add_row(
            result.name if finished else f"{result.name} ({result.outcome})",
            f"{updates:.0f}",
            f"{seconds:.1f}",
            _figure(each, ".4f"),
            _figure(ratio, ".1f"),
            _figure(latest.get("train_loss"), ".3f"),
            _figure(latest.get("test_loss"), ".3f"),
        )
    return shown


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_table(path: Path, shown: Table) -> None:
    """Writes the table as plain text."""
    with path.open("w") as file:
        Console(file=file, width=100, color_system=None).print(shown)
