"""What every data set is made of: its type, its error, and where its files may lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from benchmarks import BenchmarkError

DATA_DIR_VARIABLE = "KFGN_DATA_DIR"
CACHE_DIR_VARIABLE = "KFGN_CACHE_DIR"

BCE = "sigmoid_binary_cross_entropy"
SQUARED_ERROR = "half_squared_error"

PathLike = str | os.PathLike[str]


class Dataset(NamedTuple):
    """Images as rows, with what an experiment has to know about them."""

    name: str
    train: np.ndarray  # [n, D] float32
    test: np.ndarray  # [n, D] float32
    train_labels: np.ndarray | None  # [n] int32
    test_labels: np.ndarray | None  # [n] int32
    loss: str  # BCE (values in [0, 1]) or SQUARED_ERROR
    image_shape: tuple[int, int]
    description: str


class DataError(BenchmarkError):
    """A data set cannot be had; the message names what, what was found, and the remedy."""


def data_error(what: object, found: str, expected: str, remedy: str) -> DataError:
    """The one shape that all messages of this package have."""
    return DataError(f"{what}: found {found}; expected {expected}. Remedy: {remedy}.")


def resolve_data_dir(data_dir: PathLike | None) -> Path | None:
    """The local data folder that is asked for, or None where files are to be downloaded."""
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else None


def resolve_cache_dir(cache_dir: PathLike | None) -> Path:
    """The folder for downloads and generated data; it need not exist yet."""
    chosen = cache_dir or os.environ.get(CACHE_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(pooch.os_cache("kfgn"))


def local_file(data_dir: Path, relative: str) -> Path:
    """The path of a file in the local data folder, or a DataError where it is missing."""
    remedy = (
        f"put the file there, name another folder with --data-dir or {DATA_DIR_VARIABLE}, "
        "or give neither to download it"
    )
    if not data_dir.is_dir():
        found = "a file" if data_dir.exists() else "nothing"
        raise data_error(data_dir, found, f"a folder that holds {relative}", remedy)
    path = data_dir / relative
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise data_error(path, found, "a file", remedy)
    return path
