"""A training that can stop anywhere and go on: its folder, metrics and settings on disk."""

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks import BenchmarkError

Row = dict[str, float | None]


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
    """The rows of a CSV file: on disk as soon as measured, and in memory."""

    def __init__(
        self, folder: RunFolder, name: str, columns: Sequence[str], rows: list[Row]
    ) -> None:
        self.folder, self.name, self.columns, self.rows = folder, name, columns, rows
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
            self._write_rows(sys.stdout, self.rows, header=True)

    def _append_last(self, path: Path) -> None:
        # A folder that another file moved here has no rows yet.
        if not path.exists():
            return self._write_all(path)
        with path.open("a", newline="") as file:
            self._write_rows(file, self.rows[-1:], header=False)

    def _write_all(self, path: Path) -> None:
        # Aside and renamed: a full disk must not cost the rows that are already there.
        aside = path.with_suffix(".part")
        with aside.open("w", newline="") as file:
            self._write_rows(file, self.rows, header=True)
        aside.replace(path)

    def _write_rows(self, file: Any, rows: Iterable[Row], header: bool) -> None:
        writer = csv.DictWriter(file, self.columns, lineterminator="\n")
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
