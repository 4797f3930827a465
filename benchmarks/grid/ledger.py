"""The runs that are done, one JSON line each, so that an interrupted grid can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import BenchmarkError
from benchmarks.race import Point


class Ledger:
    """Finished runs by everything that determines them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self._done: dict[str, list[Point]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._read()
            else:
                path.write_text("")
        except OSError as error:
            raise BenchmarkError(f"cannot write runs to {path}: {error}") from error

    def _read(self) -> None:
        whole = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
                self._done[entry["run"]] = [Point(*point) for point in entry["points"]]
                whole.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that an interruption cut short
        self.path.write_text("".join(line + "\n" for line in whole))

    def find(self, run: Mapping[str, Any]) -> list[Point] | None:
        """The points of a run that was done before with just these settings."""
        return self._done.get(_key(run))

    def add(self, run: Mapping[str, Any], points: list[Point]) -> None:
        """Keeps a finished run."""
        self._done[_key(run)] = points
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"run": _key(run), "points": points}) + "\n")
        except OSError as error:
            raise BenchmarkError(f"cannot write runs to {self.path}: {error}") from error

    def finish(self) -> None:
        """All is in the results: the ledger has served its end."""
        self.path.unlink(missing_ok=True)


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps(dict(run), sort_keys=True)
