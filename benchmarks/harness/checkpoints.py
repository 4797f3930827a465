"""Checkpoints, by orbax: all that a run needs to go on as if it had not stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from benchmarks import BenchmarkError
from benchmarks.harness.runs import RunFolder


class Checkpoints:
    """Saves and restores a pytree of arrays and a few numbers, keeping the latest."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        self.folder, self.name = folder, name
        self._managers: dict[Path, ocp.CheckpointManager] = {}
        self._tried: int | None = None

    def latest(self) -> int | None:
        """The update of the latest checkpoint, None if there is none."""
        path = self.folder.path / self.name
        step: int | None = self._manager(path).latest_step() if path.exists() else None
        return step

    def save(self, update: int, arrays: Any, numbers: Mapping[str, float]) -> None:
        """Saves, once for each update; a disk that refuses costs the checkpoint, not the run."""
        if update == self._tried:
            return
        self._tried = update
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), numbers=ocp.args.JsonSave(dict(numbers))
        )

        def write(path: Path) -> None:
            try:
                self._manager(path).save(update, args=items)
            except ValueError as error:  # what tensorstore makes of a full disk
                raise OSError(str(error)) from error

        self.folder.write(self.name, write)

    def restore(self, like: Any) -> tuple[Any, dict[str, float]]:
        """The latest checkpoint, its arrays shaped as in ``like``."""
        path = self.folder.path / self.name
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(like), numbers=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager(path).restore(self.latest(), args=items)
        except (OSError, ValueError, KeyError) as error:
            raise BenchmarkError(f"cannot read the checkpoint in {path}: {error}") from error
        self._tried = self.latest()
        return restored["arrays"], dict(restored["numbers"])

    def close(self) -> None:
        """Lets go of the files."""
        for manager in self._managers.values():
            manager.close()

    def _manager(self, path: Path) -> ocp.CheckpointManager:
        # One for each place: the folder gives way to a temporary one when its disk fails.
        if path not in self._managers:
            # Not in the background: the next step would write over the buffers it donates.
            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
            self._managers[path] = ocp.CheckpointManager(path.absolute(), options=options)
        return self._managers[path]
