"""Generated arrays, kept on disk between runs.

The cache is a convenience and never a reason to fail: what cannot be read is generated again,
what cannot be written is used from memory, both with a warning.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# What a truncated, overwritten or foreign .npz makes numpy and zipfile raise.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class CacheWarning(UserWarning):
    """The cache could not be read or written; the data are right all the same."""


def cached(path: Path, recipe: Mapping[str, object], make: Callable[[], Arrays]) -> Arrays:
    """The arrays of `make()`, read from `path` where it holds the same `recipe`."""
    key = json.dumps(recipe, sort_keys=True)
    try:
        return _read(path, key)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except _UNREADABLE as error:
        warnings.warn(
            f"{path}: the cached data are unusable ({error or type(error).__name__}); "
            "generating them again.",
            CacheWarning,
            stacklevel=2,
        )
    arrays = make()
    try:
        _write(path, key, arrays)
    except OSError as error:
        warnings.warn(
            f"{path}: the generated data cannot be cached ({error}); they are used from memory. "
            "Name a writable folder with --cache-dir or KFGN_CACHE_DIR.",
            CacheWarning,
            stacklevel=2,
        )
    return arrays


def _read(path: Path, key: str) -> Arrays:
    # zipfile checks every member's CRC, so a flipped bit does not pass. The file is opened here
    # because np.load leaves it open when the archive is broken.
    with open(path, "rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    found = str(arrays.pop("recipe"))
    if found != key:
        raise ValueError(f"made by the recipe {found}, not {key}")
    return arrays


def _write(path: Path, key: str, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, then a rename: neither a crash nor a second process
    # can leave half a file under the final name.
    members: dict[str, Any] = {"recipe": np.array(key), **arrays}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            np.savez(stream, **members)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
