"""MNIST and Fashion-MNIST, in the IDX format.

An IDX file starts with two zero bytes, a byte for the type (8: unsigned bytes), a byte for the
number of dimensions, and each dimension as a big-endian 32-bit integer; the values follow.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import BCE, DATA_DIR_VARIABLE, Dataset, data_error, local_file
from .download import fetch

_REMEDY = (
    "delete the file and download it again, or name a folder with a sound copy "
    f"(--data-dir or {DATA_DIR_VARIABLE})"
)
_UNSIGNED_BYTES = 8


class IdxFile(NamedTuple):
    """One published file and what it must hold."""

    name: str
    shape: tuple[int, ...]
    md5_gz: str  # of the published .gz file: checked on download
    md5: str  # of the decompressed content: checked always, as .gz files get recompressed


class IdxFiles(NamedTuple):
    """The four files of a data set."""

    url: str
    train: IdxFile
    train_labels: IdxFile
    test: IdxFile
    test_labels: IdxFile


_TRAIN_SHAPE, _TEST_SHAPE = (60_000, 28, 28), (10_000, 28, 28)

MNIST = IdxFiles(
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    IdxFile(
        "train-images-idx3-ubyte.gz",
        _TRAIN_SHAPE,
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    IdxFile(
        "train-labels-idx1-ubyte.gz",
        _TRAIN_SHAPE[:1],
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte.gz",
        _TEST_SHAPE,
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        _TEST_SHAPE[:1],
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)

FASHION_MNIST = IdxFiles(
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    IdxFile(
        "train-images-idx3-ubyte.gz",
        _TRAIN_SHAPE,
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ),
    IdxFile(
        "train-labels-idx1-ubyte.gz",
        _TRAIN_SHAPE[:1],
        "25c81989df183df01b3e8a0aad5dffbe",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte.gz",
        _TEST_SHAPE,
        "bef4ecab320f06d8554ea6380940ec79",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        _TEST_SHAPE[:1],
        "bb300cfdad3c16e7a12a480ee83cd310",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
)


def read_idx(path: Path, shape: tuple[int, ...], md5: str | None = None) -> np.ndarray:
    """The bytes of a gzipped IDX file, `shape` uint8, or a DataError that says what is wrong.

    `md5` is that of the decompressed file, header included.
    """
    try:
        with gzip.open(path, "rb") as stream:
            content = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise data_error(
            path, f"a broken file ({type(error).__name__}: {error})", "a gzip file", _REMEDY
        ) from error

    magic = bytes((0, 0, _UNSIGNED_BYTES, len(shape)))
    header = 4 + 4 * len(shape)
    if content[:4] != magic:
        found = f"the first bytes {content[:4].hex() or '(none)'}"
        raise data_error(path, found, f"the IDX magic number {magic.hex()}", _REMEDY)
    dimensions = tuple(
        int.from_bytes(content[i : i + 4], "big") for i in range(4, min(header, len(content)), 4)
    )
    if dimensions != shape:
        raise data_error(path, f"the dimensions {dimensions}", str(shape), _REMEDY)
    size = math.prod(shape)
    if len(content) - header != size:
        raise data_error(path, f"{len(content) - header} values", str(size), _REMEDY)
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and digest != md5:
        raise data_error(path, f"md5 {digest} of the decompressed file", md5, _REMEDY)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_mnist(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """MNIST as in the paper: the first 50,000 training images, all 10,000 test images."""
    return _load("mnist", MNIST, 50_000, "MNIST: handwritten digits", data_dir, cache_dir)


def load_fashion_mnist(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """Fashion-MNIST, all 60,000 training and 10,000 test images."""
    title = "Fashion-MNIST (Zalando): pictures of clothes"
    return _load("fashion_mnist", FASHION_MNIST, 60_000, title, data_dir, cache_dir)


def _load(
    name: str,
    files: IdxFiles,
    count: int,
    title: str,
    data_dir: Path | None,
    cache_dir: Path,
) -> Dataset:
    def read(file: IdxFile) -> np.ndarray:
        if data_dir is not None:
            path = local_file(data_dir, f"{name}/{file.name}")
        else:
            path = fetch(files.url + file.name, file.md5_gz, cache_dir / name)
        return read_idx(path, file.shape, file.md5)

    # Files are read in this order so that a missing folder fails before the large reads.
    train_labels, test_labels = read(files.train_labels), read(files.test_labels)
    train, test = read(files.train)[:count], read(files.test)
    return Dataset(
        name=name,
        train=_unit_interval(train),
        test=_unit_interval(test),
        train_labels=train_labels[:count].astype(np.int32),
        test_labels=test_labels.astype(np.int32),
        loss=BCE,
        image_shape=(28, 28),
        description=(
            f"{title}, 28x28 gray levels divided by 255; the first {count:,} of the 60,000 "
            "training images and the 10,000 test images, as published."
        ),
    )


def _unit_interval(images: np.ndarray) -> np.ndarray:
    """[n, H, W] uint8 to [n, H W] float32 in [0, 1]."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows /= np.float32(255)
    return rows
