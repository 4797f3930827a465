"""The data sets of the experiments, each as one `Dataset` of float32 rows.

    from benchmarks import datasets
    data = datasets.load("curves")

| name | train, test | source |
|---|---|---|
| curves | 20,000, 10,000 | generated (see `curves`) |
| mnist | 50,000, 10,000 | download or local folder |
| faces | 103,500, 41,400 | made of the Olivetti faces, download or local folder (see `faces`) |
| digits | 1,500, 297 | scikit-learn, nothing to download |
| fashion_mnist | 60,000, 10,000 | download or local folder |

A local data folder holds `mnist/` and `fashion_mnist/` with the four IDX files under their usual
names (`train-images-idx3-ubyte.gz`, ...), and `faces/olivettifaces.mat`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from . import curves, digits, faces, idx
from .base import (
    CACHE_DIR_VARIABLE,
    DATA_DIR_VARIABLE,
    DataError,
    Dataset,
    PathLike,
    data_error,
    resolve_cache_dir,
    resolve_data_dir,
)
from .cache import CacheWarning

__all__ = [
    "CACHE_DIR_VARIABLE",
    "DATA_DIR_VARIABLE",
    "NAMES",
    "CacheWarning",
    "DataError",
    "Dataset",
    "load",
]

_LOADERS: dict[str, Callable[[Path | None, Path], Dataset]] = {
    "curves": lambda _, cache_dir: curves.load(cache_dir),
    "mnist": idx.load_mnist,
    "faces": faces.load,
    "digits": lambda _, __: digits.load(),
    "fashion_mnist": idx.load_fashion_mnist,
}

NAMES: tuple[str, ...] = tuple(_LOADERS)


def load(
    name: str, *, data_dir: PathLike | None = None, cache_dir: PathLike | None = None
) -> Dataset:
    """The data set called `name`, one of `NAMES`.

    `data_dir` is a local folder of data files (default: KFGN_DATA_DIR); without one, files are
    downloaded. `cache_dir` keeps downloads and generated data (default: KFGN_CACHE_DIR, else the
    system's cache folder). Raises `DataError` where the data cannot be had.
    """
    if name not in _LOADERS:
        close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        remedy = f"did you mean {close[0]!r}" if close else "choose one of these names"
        raise data_error("data set", repr(name), f"one of {', '.join(NAMES)}", remedy)
    return _LOADERS[name](resolve_data_dir(data_dir), resolve_cache_dir(cache_dir))
