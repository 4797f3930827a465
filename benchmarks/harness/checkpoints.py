"""The latest state of a training on disk, by orbax: all that it needs to go on as if unstopped."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from benchmarks import BenchmarkError
from benchmarks.harness.runs import RunFolder


class Checkpoint:
    """The folder ``name`` of a run, with its last two checkpoints.

    One is complete when orbax has renamed its folder; one that is damaged later is told of and
    thrown away, and the one before it used.
    """

    def __init__(self, folder: RunFolder, name: str) -> None:
        self.folder, self.name = folder, name
        self._tried: int | None = None

    def save(self, update: int, seconds: float, arrays: Any) -> None:
        """Saves, once for each update; a disk that refuses costs the checkpoint, not the run."""
        if update == self._tried:
            return
        self._tried = update
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), numbers=ocp.args.JsonSave({"seconds": seconds})
        )

        def write(path: Path) -> None:
            try:
                with _manager(path) as manager:
                    manager.save(update, args=items)
            except ValueError as error:  # what tensorstore makes of a full disk
                raise OSError(str(error)) from error

        self.folder.write(self.name, write)

    def restore(self, like: Any) -> tuple[int, float, Any] | None:
        """Updates, seconds and arrays, shaped as in ``like``; None if there is no checkpoint."""
        path = self.folder.path / self.name
        if not path.exists():
            return None
        found, problem = None, None
        with _manager(path) as manager:
            for update in sorted(manager.all_steps(), reverse=True):
                try:
                    found = update, *_read(manager, update, like)
                    break
                except (OSError, ValueError, KeyError, TypeError) as error:
                    problem = error
                    self.folder.report(f"cannot read the checkpoint {path / str(update)}: {error}")
            if found is None and problem is not None:
                raise BenchmarkError(f"cannot read the checkpoint in {path}: {problem}")
            for update in manager.all_steps():
                if found is not None and update > found[0]:
                    manager.delete(update)
        self._tried = found[0] if found else None
        return found


def _read(manager: ocp.CheckpointManager, update: int, like: Any) -> tuple[float, Any]:
    items = ocp.args.Composite(
        arrays=ocp.args.StandardRestore(like), numbers=ocp.args.JsonRestore()
    )
    stored = manager.restore(update, args=items)
    return float(stored["numbers"]["seconds"]), stored["arrays"]


def _manager(path: Path) -> ocp.CheckpointManager:
    # Not in the background: the next step would write over the buffers it donates.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(path.absolute(), options=options)
