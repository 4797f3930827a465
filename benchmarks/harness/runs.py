"""What a run keeps on disk: its folder, settings and metrics."""

import csv
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import flax
import jax
import optax

import kfgn
from benchmarks import BenchmarkError
from benchmarks.harness.optimizers import STATE_METRICS

Row = dict[str, float | None]

COLUMNS = (
    "update",
    "seconds",
    "batch_loss",
    "train_loss",
    "test_loss",
    *STATE_METRICS,
)


@dataclass
class Result:
    """What one optimizer's run gave; ``params`` is None if it was cut off before they were safe."""

    name: str
    outcome: str  # "finished", "interrupted" or "diverged"
    rows: list[Row]
    params: Any

    def curve(self, across: str, up: str) -> tuple[list[float], list[float]]:
        """The points of one column against another, where both were measured."""
        pairs = [(row.get(across), row.get(up)) for row in self.rows]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        return [x for x, _ in points], [y for _, y in points]


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Finds out before any training whether ``folder`` can be written and has room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BenchmarkError(f"cannot write to the run folder {folder}: {error}") from error
    if free < needed_bytes:
        raise BenchmarkError(
            f"the run folder {folder} has {free / 2**20:.0f} MiB free, and the run needs about "
            f"{needed_bytes / 2**20:.0f} MiB for its checkpoints; choose another with --out"
        )


def new_run(out: Path, name: str) -> Path:
    """Makes the next free folder ``out/name-001``, ``out/name-002``, ...: no run overwrites one."""
    number = max((number for number, _ in _runs(out, name)), default=0)
    while True:
        number += 1
        try:
            (out / f"{name}-{number:03}").mkdir()
        except FileExistsError:  # another run took it meanwhile
            continue
        except OSError as error:
            raise BenchmarkError(f"cannot make a run folder in {out}: {error}") from error
        return out / f"{name}-{number:03}"


def latest_run(out: Path, name: str) -> Path:
    """The folder of the latest run of this name, to be resumed."""
    found = sorted(_runs(out, name))
    if not found:
        raise BenchmarkError(f"--resume: no run named {name}-* in {out}")
    return found[-1][1]


def _runs(out: Path, name: str) -> list[tuple[int, Path]]:
    folders = out.glob(f"{name}-*")
    numbered = [(folder.name.removeprefix(f"{name}-"), folder) for folder in folders]
    return [(int(number), folder) for number, folder in numbered if number.isdecimal()]


class RunFolder:
    """A folder that gives way to a temporary one when it can no longer be written.

    ``problems`` lists what went wrong, for the end of the run; each is also told when it happens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._lost = False

    def write(self, name: str, write: Callable[[Path], Any], anew: Any = None) -> Path | None:
        """Calls ``write`` with the path of the file ``name``.

        If that fails, calls ``anew`` (by default ``write`` again) with a path in a temporary
        folder, where everything later goes too. Returns the path written, None if both failed.
        """
        try:
            return self._write(name, write)
        except OSError as error:
            if self._lost:  # no disk takes anything, which has been said
                return None
            self.report(f"cannot write {self.path / name}: {error}")
        try:
            self.path = Path(tempfile.mkdtemp(prefix="kfgn-run-"))
            written = self._write(name, anew or write)
        except OSError as error:
            self.report(f"cannot write {name} to a temporary folder either: {error}")
            self._lost = True
            return None
        self.report(f"from here on the run's files are in {self.path}")
        return written

    def write_json(self, name: str, content: Any) -> None:
        """Writes settings so that a reader never sees half a file."""
        text = json.dumps(content, indent=2) + "\n"

        def replace(path: Path) -> None:
            path.with_suffix(".part").write_text(text)
            path.with_suffix(".part").replace(path)

        self.write(name, replace)

    def report(self, problem: str) -> None:
        """Notes a problem, and says so at once."""
        self.problems.append(problem)
        print(f"warning: {' '.join(problem.split())}", file=sys.stderr, flush=True)

    def _write(self, name: str, write: Callable[[Path], Any]) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return path


class Metrics:
    """The rows of one optimizer's CSV file: on disk as soon as measured, and in memory."""

    def __init__(self, folder: RunFolder, name: str, rows: list[Row]) -> None:
        self.folder, self.name, self.rows = folder, name, rows
        self.saved = folder.write(name, self._write_all) is not None

    def add(self, row: Row) -> None:
        """Appends one row; if the disk refuses, all rows move to the folder that takes over."""
        self.rows.append(row)
        write = self._append_last if self.saved else self._write_all
        self.saved = self.folder.write(self.name, write, self._write_all) is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The last resort: the rows that no disk took.
        if not self.saved:
            _write_rows(sys.stdout, self.rows, header=True)

    def _append_last(self, path: Path) -> None:
        # A folder that another file moved here has no rows yet.
        if not path.exists():
            return self._write_all(path)
        with path.open("a", newline="") as file:
            _write_rows(file, self.rows[-1:], header=False)

    def _write_all(self, path: Path) -> None:
        # Aside and renamed: a full disk must not cost the rows that are already there.
        aside = path.with_suffix(".part")
        with aside.open("w", newline="") as file:
            _write_rows(file, self.rows, header=True)
        aside.replace(path)


def _write_rows(file: Any, rows: Iterable[Row], header: bool) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """Reads a CSV file of numbers; an empty cell is None, an unfinished last line is dropped."""
    with path.open(newline="") as file:
        rows = []
        for line in csv.DictReader(file):
            if None in line or None in line.values():
                continue  # too many or too few cells: the disk filled up in mid-line
            rows.append({key: _number(cell) for key, cell in line.items()})
    return rows


def _number(cell: str) -> float | None:
    if not cell:
        return None
    return int(cell) if cell.isdecimal() else float(cell)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings.json of a run that is to be resumed."""
    try:
        stored = json.loads(path.read_text())
        return {"settings": dict(stored["settings"]), "sessions": list(stored["sessions"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"--resume: cannot read the settings in {path}: {error}") from error


def check_same(path: Path, now: Mapping[str, Any]) -> None:
    """Insists that a run is resumed with the settings that it was started with."""
    before = read_settings(path)["settings"]
    for name, value in json.loads(json.dumps(now)).items():
        if before.get(name) != value:
            raise BenchmarkError(
                f"--resume: {name} is {value} now and was {before.get(name)} in {path}; "
                "use the same, or leave out --resume to start a new run"
            )


def environment() -> dict[str, Any]:
    """What the timings of a run depend on."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "cpu_count": cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "flax": flax.__version__,
        "kfgn": getattr(kfgn, "__version__", "unknown"),
    }


def cpu_count() -> int:
    """The cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
