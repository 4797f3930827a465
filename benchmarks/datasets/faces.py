"""FACES: 25x25 images made of the Olivetti faces (AT&T Laboratories Cambridge).

Hinton & Salakhutdinov (2006) turned 400 photographs, ten of each of 40 people, into 165,600
images: 414 random pairs of a rotation angle (-90 to 90 degrees) and a scaling factor (1.4 to 1.8)
per photograph, rotated, scaled, cropped and subsampled. The first 25 people are for training
(103,500 images), the last 10 for testing (41,400). How they cropped, subsampled and interpolated
is not published (MATLAB's imrotate and imresize with a crop are plausible), nor are the random
pairs, so this is a set made to the same recipe, not theirs.

Chosen here: the photograph, turned and magnified about its center, is cropped to its central 50x50
pixels, of which 25x25 points are kept, evenly spaced from corner to corner. Rotation, scaling and
subsampling are ONE bilinear interpolation in the 64x64 photograph (at a factor of 1.6 the image
shows about 31 of its pixels across, a patch of a face; no point falls outside it). The result is
rounded to 256 gray levels, the training mean is subtracted pixel by pixel, and one factor makes
the average variance of a training pixel 1.

Published: the squared error per test image of a 30-component PCA is 135. Found here (414 pairs,
seed 0): 135.1, and 101.2 on the training images. It grows with the crop (130 at 48 pixels, 140 at
52) and with a rougher interpolation (162 for the nearest pixel, 156 for a cubic spline), so crop
and interpolation cannot be told apart by it: bilinear with a crop of 50 is a plausible pair.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
from scipy import io, ndimage

from .base import DATA_DIR_VARIABLE, SQUARED_ERROR, Dataset, data_error, local_file
from .cache import Arrays, cached
from .download import RETRIES, download_error

SIZE, PHOTO_SIZE = 25, 64
PER_PERSON, PEOPLE, TRAIN_PEOPLE, TEST_PEOPLE = 10, 40, 25, 10
PAIRS = 414
MAX_DEGREES = 90.0
MIN_SCALE, MAX_SCALE = 1.4, 1.8
CROP = 50  # pixels of the magnified photograph, across

_LOCAL_FILE = "faces/olivettifaces.mat"
_URL = "https://ndownloader.figshare.com/files/5976027"  # where scikit-learn gets them


def load(data_dir: Path | None, cache_dir: Path, *, pairs: int = PAIRS, seed: int = 0) -> Dataset:
    """Generated faces [250 pairs, 625] and [100 pairs, 625], from the cache if there."""
    photos = read_photos(data_dir, cache_dir)  # [400, 64, 64]
    train_count, test_count = TRAIN_PEOPLE * PER_PERSON, TEST_PEOPLE * PER_PERSON
    test_first = len(photos) - test_count
    recipe = {
        "version": 1,
        "pairs": pairs,
        "seed": seed,
        "parameters": [MAX_DEGREES, MIN_SCALE, MAX_SCALE, CROP],
        "photos": hashlib.md5(photos.tobytes(), usedforsecurity=False).hexdigest(),
    }

    def make() -> Arrays:
        return {
            "train": generate(photos[:train_count], pairs, seed=seed),
            "test": generate(photos[test_first:], pairs, seed=seed, first=test_first),
        }

    arrays = cached(cache_dir / f"faces-{pairs}-seed{seed}.npz", recipe, make)
    train, test = standardize(arrays["train"], arrays["test"])
    person = np.arange(len(photos), dtype=np.int32) // PER_PERSON
    return Dataset(
        name="faces",
        train=train,
        test=test,
        train_labels=np.repeat(person[:train_count], pairs),
        test_labels=np.repeat(person[test_first:], pairs),
        loss=SQUARED_ERROR,
        image_shape=(SIZE, SIZE),
        description=(
            "Olivetti faces, randomly rotated and scaled to 25x25 pixels after the recipe of "
            "Hinton & Salakhutdinov (2006), centered and scaled to an average pixel variance of 1; "
            "crop and interpolation calibrated on a published figure, not the original file."
        ),
    )


def read_photos(data_dir: Path | None, cache_dir: Path) -> np.ndarray:
    """The 400 photographs [400, 64, 64] float32 in [0, 1], ten of each person in order."""
    if data_dir is None:
        return _download_photos(cache_dir / "olivetti")
    path = local_file(data_dir, _LOCAL_FILE)
    remedy = f"replace the file, or give no --data-dir and no {DATA_DIR_VARIABLE} to download it"
    expected = f"a MATLAB file with 'faces' {PHOTO_SIZE**2} x {PEOPLE * PER_PERSON} uint8"
    try:
        faces = io.loadmat(path)["faces"]
    except KeyError as error:
        raise data_error(path, "no variable 'faces'", expected, remedy) from error
    except Exception as error:  # loadmat has no error of its own for a broken file
        found = f"a broken file ({type(error).__name__}: {error})"
        raise data_error(path, found, expected, remedy) from error
    if faces.shape != (PHOTO_SIZE**2, PEOPLE * PER_PERSON) or faces.dtype != np.uint8:
        found = f"'faces' {' x '.join(map(str, faces.shape))} {faces.dtype}"
        raise data_error(path, found, expected, remedy)
    # The same steps as scikit-learn's, so that both sources give the same photographs.
    photos = faces.T.astype(np.float32)
    photos -= photos.min()
    photos /= photos.max()
    # MATLAB stores column by column.
    return np.ascontiguousarray(photos.reshape(-1, PHOTO_SIZE, PHOTO_SIZE).transpose(0, 2, 1))


def _download_photos(folder: Path) -> np.ndarray:
    from sklearn.datasets import fetch_olivetti_faces

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every retry; the error says it all
            faces = fetch_olivetti_faces(data_home=str(folder), n_retries=RETRIES)
    except Exception as error:  # network, checksum, or a broken pickle in its own cache
        raise download_error(_URL, folder, error) from error
    return np.ascontiguousarray(faces.images, dtype=np.float32)


def generate(photos: np.ndarray, pairs: int, *, seed: int = 0, first: int = 0) -> np.ndarray:
    """`pairs` random images of each of `photos` [n, 64, 64], as [n pairs, 625] uint8.

    Photograph i has the random stream (seed, first + i): a part of the set does not depend on
    the rest, and fewer pairs are the first of more.
    """
    images = np.empty((len(photos), pairs, SIZE * SIZE), np.uint8)
    for i, photo in enumerate(photos):
        draws = np.random.default_rng((seed, first + i)).random((pairs, 2))
        degrees = MAX_DEGREES * (2 * draws[:, 0] - 1)
        scales = MIN_SCALE + (MAX_SCALE - MIN_SCALE) * draws[:, 1]
        images[i] = np.rint(255 * rotate_and_scale(photo, degrees, scales))
    return images.reshape(-1, SIZE * SIZE)


def rotate_and_scale(photo: np.ndarray, degrees: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`photo` [64, 64] turned (anticlockwise), magnified, cropped and subsampled: [k, 625]."""
    grid = np.linspace(-(CROP - 1) / 2, (CROP - 1) / 2, SIZE)
    down, right = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))  # [625]
    angle = np.deg2rad(degrees)
    cos, sin = (np.cos(angle) / scales)[:, None], (np.sin(angle) / scales)[:, None]  # [k, 1]
    center = (PHOTO_SIZE - 1) / 2
    at = np.stack([center + cos * down + sin * right, center - sin * down + cos * right])
    values: np.ndarray = ndimage.map_coordinates(photo, at, order=1, mode="nearest")
    return values


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as float32, with zero mean per pixel and average variance 1 over `train`."""
    mean = train.mean(axis=0, dtype=np.float64)
    # In parts: a float64 copy of the whole set would take 0.5 GB.
    parts = np.array_split(train, max(1, len(train) // 10_000))
    variance = sum(float(np.square(part - mean).sum()) for part in parts) / train.size

    def scaled(rows: np.ndarray) -> np.ndarray:
        result = rows.astype(np.float32)
        result -= mean.astype(np.float32)
        result /= np.float32(np.sqrt(variance))
        return result

    return scaled(train), scaled(test)
