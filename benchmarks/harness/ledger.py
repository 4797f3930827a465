"""What an experiment has measured so far, one JSON line each, so that it can be interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks import BenchmarkError
from benchmarks.harness.record import writing


class Ledger:
    """Finished measurements by everything that determines them.

    As a context it removes its file when all is done; where it is left by Ctrl-C or an error the
    file stays, and `resume` reads it.

    Args:
      path: of the file; None keeps nothing on disk.
      resume: whether to go on from what the file has; else it is started anew.
      environment: versions and machine: what was measured elsewhere is measured again.
    """

    def __init__(self, path: Path | None, resume: bool, environment: Mapping[str, Any]) -> None:
        self.path, self._environment = path, dict(environment)
        self._done: dict[str, Any] = {}
        if path is None:
            return
        if resume and not path.exists():
            raise BenchmarkError(
                f"--resume: nothing is unfinished in {path.parent}; leave out --resume to start"
            )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume:
                self._read(path)
            else:
                path.write_text("")

    def measure(self, what: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured before with just these settings, or else is measured now.

        Either way it comes as JSON gives it: tuples as lists, keys as text.
        """
        found = self.find(what)
        return self.add(what, measure()) if found is None else found

    def find(self, what: Mapping[str, Any]) -> Any | None:
        """What was measured before with just these settings, None if nothing was."""
        return self._done.get(self._key(what))

    def add(self, what: Mapping[str, Any], measured: Any) -> Any:
        """Keeps a measurement, and returns it as `find` will."""
        key = self._key(what)
        line = json.dumps({"what": key, "measured": measured})
        if self.path is not None:
            with writing(self.path), self.path.open("a") as file:
                file.write(line + "\n")
        self._done[key] = json.loads(line)["measured"]
        return self._done[key]

    def _read(self, path: Path) -> None:
        whole = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                self._done[entry["what"]] = entry["measured"]
                whole.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the line that an interruption cut short
        path.write_text("".join(line + "\n" for line in whole))

    def _key(self, what: Mapping[str, Any]) -> str:
        return json.dumps({**self._environment, **what}, sort_keys=True, default=repr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.path is None:
            return
        if kind is None:
            self.path.unlink(missing_ok=True)
        elif self._done:
            said = "what was measured is kept: the same command with --resume goes on from there"
            print(said, file=sys.stderr)
