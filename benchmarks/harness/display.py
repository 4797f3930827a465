"""What is shown on the terminal: how far the work is, and tables of figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.harness import interrupt

LINE_SECONDS = 10.0  # between the lines that stand in for a progress bar
WIDTH = 110  # of a table in a file, and of one on what is no terminal


def make_console() -> Console:
    """As wide as the terminal, or as a table in a file is."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


class Ticker:
    """A progress bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, console: Console, bar: Progress, name: str, total: int, done: int) -> None:
        self.console, self.bar, self.name, self.total = console, bar, name, total
        self.done, self._first, self._began = done, done, time.monotonic()
        self._last = self._began
        self._task = bar.add_task(name, total=total, completed=done, figures="")

    def step(self, figures: str = "") -> None:
        """One more of `total` is done."""
        self.done += 1
        self.bar.update(self._task, completed=self.done, figures=figures)
        now = time.monotonic()
        due = now - self._last >= LINE_SECONDS or self.done == self.total
        if due and not self.console.is_terminal:
            self._last = now
            each = (now - self._began) / (self.done - self._first)
            left = round((self.total - self.done) * each)
            line = f"{self.name}  {self.done}/{self.total}  {figures}"
            line += f"  {left // 60}:{left % 60:02} left" if left else ""
            self.console.print(line, highlight=False, soft_wrap=True)

    def expect(self, more: int) -> None:
        """So many more than were announced."""
        self.total += more
        self.bar.update(self._task, total=self.total)


@contextmanager
def progress(console: Console, name: str, total: int, done: int = 0) -> Iterator[Ticker]:
    """Shows how much of `total` is done: `with progress(...) as ticker: ticker.step("loss 3")`.

    Ctrl-C before is heeded here: what comes next has not begun.
    """
    interrupt.check()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        yield Ticker(console, bar, name, total, done)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose first column is text and whose others are figures; None shows as a dash."""
    shown = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*("-" if cell is None else str(cell) for cell in row))
    return shown


def figure(value: float | None, form: str) -> str | None:
    """The number in that form, for a cell; None if there is none."""
    return None if value is None else format(value, form)


def write_tables(path: Any, tables: Sequence[Table]) -> None:
    """Writes tables as plain text."""
    with path.open("w") as file:
        for shown in tables:
            Console(file=file, width=WIDTH, color_system=None).print(shown)
