"""What the experiments with command lines of their own share: options, progress, a written record.

An experiment is a module with a function `main(arguments)`, named in
`benchmarks.__main__.EXPERIMENTS`. It leaves a folder with `results.json` (the command, its
settings, the machine and what was measured), `table.txt` and plots.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jax
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import kfgn
from benchmarks import BenchmarkError
from benchmarks.harness.arguments import OneLineParser, seed_int
from benchmarks.harness.ledger import Ledger

LINE_SECONDS = 10.0  # between the lines that stand in for a progress bar
RESULTS = Path("benchmarks/results")


def options(
    name: str, doc: str | None, data: bool = True, resumable: bool = False
) -> OneLineParser:
    """A parser with the options of every experiment: --out, --seed, and --data-dir, --resume."""
    parser = OneLineParser(prog=f"python -m benchmarks {name}", description=doc, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=RESULTS / name, help="folder for the results")
    parser.add_argument("--seed", type=seed_int, default=0, help="of parameters and batches (0)")
    if data:
        parser.add_argument("--data-dir", type=Path, help="read the data's files here")
    if resumable:
        parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    return parser


def ledger(given: Any) -> Ledger:
    """Where a resumable experiment keeps what it has measured, until it records all of it."""
    found = environment()
    del found["date"]
    return Ledger(given.out / "measured.jsonl", given.resume, found)


def settings(given: Any) -> dict[str, Any]:
    """The options, as the record has them: without those that change nothing that is measured."""
    return {k: v for k, v in vars(given).items() if k not in ("data_dir", "out", "resume")}


def all_seeds(given: Any) -> range:
    """`--seeds` of them, from `--seed` on."""
    return range(given.seed, given.seed + given.seeds)


class Ticker:
    """A progress bar on a terminal, and now and then a line elsewhere."""

    def __init__(self, console: Console, bar: Progress, name: str, total: int) -> None:
        self.console, self.bar, self.name, self.total = console, bar, name, total
        self.done, self._last = 0, time.monotonic()
        self._task = bar.add_task(name, total=total, figures="")

    def step(self, figures: str = "") -> None:
        """One more of `total` is done."""
        self.done += 1
        self.bar.update(self._task, completed=self.done, figures=figures)
        now = time.monotonic()
        due = now - self._last >= LINE_SECONDS or self.done == self.total
        if due and not self.console.is_terminal:
            self._last = now
            line = f"{self.name}  {self.done}/{self.total}  {figures}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def expect(self, more: int) -> None:
        """So many more than were announced."""
        self.total += more
        self.bar.update(self._task, total=self.total)


@contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Ticker]:
    """Shows how much of `total` is done: `with progress(...) as ticker: ticker.step("loss 3")`."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        yield Ticker(console, bar, name, total)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table whose first column is text and whose others are figures; None shows as a dash."""
    shown = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        shown.add_row(*("-" if cell is None else str(cell) for cell in row))
    return shown


def record(
    folder: Path,
    name: str,
    arguments: Sequence[str] | None,
    settings: Mapping[str, Any],
    measured: Any,
    tables: Sequence[Table],
    console: Console,
) -> None:
    """Prints the tables and writes them with everything measured into the folder."""
    report = {
        "command": _command(name, arguments or []),
        **environment(),
        "settings": dict(settings),
    }
    report["measured"] = _finite(measured)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        with (folder / "table.txt").open("w") as file:
            for shown in tables:
                Console(file=file, width=110, color_system=None).print(shown)
    except OSError as error:
        raise BenchmarkError(f"cannot write results to {folder}: {error}") from error
    for shown in tables:
        console.print(shown)
    console.print(f"written to {folder}")


def _command(name: str, arguments: Sequence[str]) -> str:
    """What measures the same again: without folders and --resume."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--data-dir"):
            next(rest, None)
        elif argument != "--resume" and not argument.startswith(("--out=", "--data-dir=")):
            kept.append(argument)
    return " ".join(["python -m benchmarks", name, *kept])


def _finite(measured: Any) -> Any:
    """The same with null for what JSON cannot say: a number that is not finite."""
    if isinstance(measured, Mapping):
        return {key: _finite(value) for key, value in measured.items()}
    if isinstance(measured, (list, tuple)):
        return [_finite(value) for value in measured]
    return None if isinstance(measured, float) and not math.isfinite(measured) else measured


def environment() -> dict[str, Any]:
    """What a result should be read with."""
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "kfgn": kfgn.__version__,
    }
