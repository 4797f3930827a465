"""The data sets of the benchmarks: generated, local, downloaded and broken ones."""

from __future__ import annotations

import functools
import gzip
import os
import re
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest

pooch = pytest.importorskip("pooch")
scipy_io = pytest.importorskip("scipy.io")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

from scipy import linalg  # noqa: E402
from scipy.interpolate import CubicSpline  # noqa: E402

import kfgn  # noqa: E402
from benchmarks import datasets  # noqa: E402
from benchmarks.datasets import base, curves, faces, idx  # noqa: E402
from benchmarks.datasets.cache import CacheWarning, cached  # noqa: E402
from benchmarks.datasets.download import SizeLimit, fetch  # noqa: E402

REAL_DATA_DIR = os.environ.get(datasets.DATA_DIR_VARIABLE)
needs_real_data = pytest.mark.skipif(
    not REAL_DATA_DIR, reason=f"{datasets.DATA_DIR_VARIABLE} names no folder with the real data"
)


def total_variance(rows: np.ndarray) -> float:
    """The sum over pixels of the variance of `rows` [n, D]."""
    return float(rows.var(axis=0, dtype=np.float64).sum())


def pca_test_error(train: np.ndarray, test: np.ndarray, components: int) -> float:
    """Mean squared error per row of `test` [m, D] under a PCA of `train` [n, D]."""
    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = train - mean
    covariance = (centered.T @ centered).astype(np.float64)
    size = len(covariance)
    _, basis = linalg.eigh(covariance, subset_by_index=[size - components, size - 1])
    residual = (test - mean).astype(np.float64)
    residual -= (residual @ basis) @ basis.T
    return float(np.square(residual).sum(axis=1).mean())


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the user's data or writes to the user's cache by accident."""
    monkeypatch.delenv(datasets.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv(datasets.CACHE_DIR_VARIABLE, str(tmp_path / "cache"))


def check_dataset(data: datasets.Dataset) -> None:
    """What every data set promises."""
    assert data.name in datasets.NAMES
    assert data.description.endswith(".")
    assert isinstance(getattr(kfgn.losses, data.loss), kfgn.losses.Loss)
    for rows, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert rows.dtype == np.float32
        assert rows.shape[1] == np.prod(data.image_shape)
        assert np.isfinite(rows).all()
        if data.loss == "sigmoid_binary_cross_entropy":
            assert rows.min() >= 0
            assert rows.max() <= 1
        else:
            assert data.loss == "half_squared_error"
        if labels is not None:
            assert labels.shape == rows.shape[:1]
            assert labels.dtype == np.int32


# ------------------------------------------------------------------ names and folders


@pytest.mark.parametrize(
    ("name", "hint"),
    [("mnsit", "did you mean 'mnist'"), ("Curves", "did you mean 'curves'"), ("zzz", "choose")],
)
def test_unknown_name_lists_the_names(name: str, hint: str) -> None:
    with pytest.raises(datasets.DataError) as error:
        datasets.load(name)
    assert repr(name) in str(error.value)
    assert hint in str(error.value)
    for known in datasets.NAMES:
        assert known in str(error.value)


def test_folders_come_from_the_argument_then_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert base.resolve_data_dir(None) is None
    monkeypatch.setenv(datasets.DATA_DIR_VARIABLE, "/from/environment")
    assert base.resolve_data_dir(None) == Path("/from/environment")
    assert base.resolve_data_dir(tmp_path) == tmp_path
    assert base.resolve_cache_dir(None) == tmp_path / "cache"
    monkeypatch.delenv(datasets.CACHE_DIR_VARIABLE)
    assert base.resolve_cache_dir(None) == Path(pooch.os_cache("kfgn"))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "faces"])
def test_missing_folder_and_missing_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    monkeypatch.setenv(datasets.DATA_DIR_VARIABLE, str(absent))
    with pytest.raises(datasets.DataError, match=f"{re.escape(str(absent))}: found nothing"):
        datasets.load(name)
    with pytest.raises(datasets.DataError, match=f"{name}.*no such file.*Remedy.*--data-dir"):
        datasets.load(name, data_dir=tmp_path)


# ------------------------------------------------------------------ digits


def test_digits() -> None:
    data = datasets.load("digits", data_dir="/ignored/as/it/needs/no/files")
    check_dataset(data)
    assert data.train.shape == (1500, 64)
    assert data.test.shape == (297, 64)
    assert data.train.max() == 1


# ------------------------------------------------------------------ curves


def test_spline_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(rng.uniform(0, 27, (20, 3)), axis=1)
    y = rng.uniform(0, 27, (20, 3))
    at = x[:, :1] + np.linspace(0, 1, 31) * (x[:, 2:] - x[:, :1])
    expected = [CubicSpline(*row, bc_type="natural")(t) for *row, t in zip(x, y, at, strict=True)]
    np.testing.assert_allclose(curves.natural_spline(x, y, at), expected, rtol=1e-7, atol=1e-7)


def test_points_are_evenly_spaced_along_the_curve() -> None:
    angle = np.pi * np.linspace(0, 1, 2000) ** 2  # a half circle, sampled unevenly
    points = curves.evenly_spaced(np.cos(angle)[None], np.sin(angle)[None], 11)[0]
    angles = np.arctan2(points[:, 1], points[:, 0])
    np.testing.assert_allclose(angles, np.pi * np.arange(11) / 10, atol=1e-6)


def test_ink_is_shared_and_clipped() -> None:
    one = curves.draw(np.array([[[10.25, 14.5]]]))[0]
    np.testing.assert_allclose(one.sum(), curves.INK * curves.B * (1 + curves.A))
    rows, columns = np.mgrid[:28, :28]
    np.testing.assert_allclose((one * rows).sum() / one.sum(), 14.5)
    np.testing.assert_allclose((one * columns).sum() / one.sum(), 10.25)
    corners = np.array([[[0.0, 0.0]] * 60, [[27.0, 27.0]] * 60])
    image = curves.draw(corners)
    assert image.max() == 1
    assert image[0, 0, 0] == image[1, 27, 27] == 1


def test_curves_are_deterministic_in_the_seed() -> None:
    few, more = curves.generate(20, seed=3), curves.generate(50, seed=3)
    np.testing.assert_array_equal(few, more[:20])
    assert few.dtype == np.uint8
    assert not np.array_equal(few, curves.generate(20, seed=4))


def test_curves_stay_inside_the_image() -> None:
    points = curves.sample_curves(500)
    assert points.shape == (500, 60, 2)
    assert points.min() >= 0
    assert points.max() <= 27
    assert (np.diff(points[..., 0], axis=1) > 0).all()  # drawn from left to right


def test_curves_come_near_the_published_figures(tmp_path: Path) -> None:
    data = curves.load(tmp_path, train_count=5000, test_count=2000)
    check_dataset(data)
    assert abs(pca_test_error(data.train, data.test, 18) - 5.90) < 0.3
    assert 15.5 < total_variance(data.train) < 18


def test_pca_error_is_zero_where_the_components_suffice() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 8)) + 1).astype(np.float32)
    assert pca_test_error(rows, rows, 3) < 1e-9
    spread = pca_test_error(rows, rows, 2)
    assert 0 < spread < total_variance(rows)


# ------------------------------------------------------------------ the cache


def test_curves_are_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = curves.load(tmp_path, train_count=30, test_count=10)
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"]
    monkeypatch.setattr(curves, "generate", None)  # a call would fail
    second = curves.load(tmp_path, train_count=30, test_count=10)
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.test, second.test)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _not_an_archive(path: Path) -> None:
    with open(path, "wb") as stream:
        np.save(stream, np.zeros(3))


def _foreign_archive(path: Path) -> None:
    np.savez(path, values=np.zeros(3))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip_a_byte,
        _not_an_archive,
        _foreign_archive,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip file"),
    ],
)
def test_corrupt_cache_is_made_again(damage, tmp_path: Path) -> None:
    path = tmp_path / "values.npz"
    values = np.arange(1000.0)

    def make() -> dict[str, np.ndarray]:
        return {"values": values}

    cached(path, {"seed": 0}, make)
    damage(path)
    with pytest.warns(CacheWarning, match=r"values\.npz.*unusable.*generating"):
        again = cached(path, {"seed": 0}, make)
    np.testing.assert_array_equal(again["values"], values)
    np.testing.assert_array_equal(cached(path, {"seed": 0}, lambda: {})["values"], values)


def test_cache_of_another_recipe_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "values.npz"
    cached(path, {"seed": 0}, lambda: {"values": np.zeros(3)})
    with pytest.warns(CacheWarning, match="recipe"):
        arrays = cached(path, {"seed": 1}, lambda: {"values": np.ones(3)})
    assert arrays["values"].sum() == 3


def test_unwritable_cache_is_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "a_file"
    blocked.write_text("where the cache folder should be")
    with pytest.warns(CacheWarning, match="cannot be cached.*used from memory"):
        data = curves.load(blocked, train_count=3, test_count=2)
    assert data.train.shape == (3, 784)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.warns(CacheWarning, match="no space left"):
        cached(tmp_path / "cache" / "x.npz", {}, lambda: {"values": np.zeros(3)})
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------ faces


@pytest.fixture
def photo_dir(tmp_path: Path) -> Path:
    """A local data folder with 400 random photographs in the place of the Olivetti faces."""
    folder = tmp_path / "data"
    (folder / "faces").mkdir(parents=True)
    photos = np.random.default_rng(0).integers(0, 243, (4096, 400), dtype=np.uint8)
    scipy_io.savemat(folder / "faces" / "olivettifaces.mat", {"faces": photos})
    return folder


def test_faces_of_random_photographs(
    photo_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = faces.load(photo_dir, tmp_path / "cache", pairs=3)
    check_dataset(data)
    assert data.train.shape == (750, 625)
    assert data.test.shape == (300, 625)
    assert data.train_labels is not None
    assert data.test_labels is not None
    assert set(data.train_labels) == set(range(25))
    assert set(data.test_labels) == set(range(30, 40))
    np.testing.assert_allclose(data.train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(data.train.var(axis=0).mean(), 1, rtol=1e-5)

    monkeypatch.setattr(faces, "generate", None)  # a call would fail
    again = faces.load(photo_dir, tmp_path / "cache", pairs=3)
    np.testing.assert_array_equal(data.train, again.train)
    np.testing.assert_array_equal(data.test, again.test)


def test_faces_are_deterministic_in_the_seed() -> None:
    photos = np.random.default_rng(0).random((4, 64, 64), dtype=np.float32)
    few, more = faces.generate(photos, 2, seed=5), faces.generate(photos, 6, seed=5)
    np.testing.assert_array_equal(few.reshape(4, 2, -1), more.reshape(4, 6, -1)[:, :2])
    np.testing.assert_array_equal(faces.generate(photos[1:], 2, seed=5, first=1), few[2:])
    assert not np.array_equal(few, faces.generate(photos, 2, seed=6))


def test_rotation_and_scale_of_a_slope() -> None:
    down, right = np.mgrid[:64, :64] - 31.5
    slope = 2 * down + right  # bilinear interpolation is exact here
    grid = np.linspace(-24.5, 24.5, 25)
    images = faces.rotate_and_scale(slope, np.array([0.0, 90.0]), np.array([1.4, 1.75]))
    upright, turned = images.reshape(2, 25, 25)
    v, u = np.meshgrid(grid, grid, indexing="ij")
    np.testing.assert_allclose(upright, (2 * v + u) / 1.4, atol=1e-12)
    np.testing.assert_allclose(turned * 1.75, np.rot90(2 * v + u), atol=1e-12)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "a broken file"),
        ({"other": np.zeros(3)}, "no variable 'faces'"),
        ({"faces": np.zeros((4096, 4), np.uint8)}, "'faces' 4096 x 4 uint8"),
        ({"faces": np.zeros((4096, 400))}, "'faces' 4096 x 400 float64"),
    ],
)
def test_broken_faces_file(content: dict | None, found: str, photo_dir: Path) -> None:
    path = photo_dir / "faces" / "olivettifaces.mat"
    if content is None:
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        scipy_io.savemat(path, content)
    with pytest.raises(datasets.DataError) as error:
        datasets.load("faces", data_dir=photo_dir)
    for part in (str(path), found, "expected", "Remedy"):
        assert part in str(error.value)


def test_failed_faces_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        warnings.warn("retrying", stacklevel=2)  # as scikit-learn does; must not get through
        raise urllib.error.URLError("host unreachable")

    monkeypatch.setattr(sklearn_datasets, "fetch_olivetti_faces", refuse)
    with pytest.raises(datasets.DataError, match=r"figshare.*host unreachable.*KFGN_DATA_DIR"):
        datasets.load("faces")


# ------------------------------------------------------------------ IDX files


def idx_bytes(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim))
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
SOUND = idx_bytes(IMAGES)
# Without the time of day, by which the names of tests would differ between processes.
squeezed = functools.partial(gzip.compress, mtime=0)


def test_idx_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(squeezed(SOUND))
    np.testing.assert_array_equal(idx.read_idx(path, IMAGES.shape), IMAGES)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (SOUND, "a broken file"),
        (squeezed(SOUND)[:-500], "a broken file"),
        (squeezed(SOUND)[:200] + b"junk" + squeezed(SOUND)[204:], "a broken file"),
        (b"", "the first bytes"),
        (squeezed(b"\0\0\x0d\3" + SOUND[4:]), "the first bytes 00000d03"),
        (squeezed(SOUND[:10]), "the dimensions"),
        (squeezed(idx_bytes(IMAGES[:4])), r"the dimensions (4, 28, 28)"),
        (squeezed(SOUND[:-7]), "3913 values"),
        (squeezed(SOUND + b"\0"), "3921 values"),
        (squeezed(SOUND[:-1] + bytes((SOUND[-1] ^ 1,))), "md5"),
    ],
)
def test_broken_idx_file(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    md5 = pooch_md5(SOUND, tmp_path)
    with pytest.raises(datasets.DataError) as error:
        idx.read_idx(path, IMAGES.shape, md5)
    for part in (str(path), found, "expected", "Remedy"):
        assert part in str(error.value)


def pooch_md5(content: bytes, folder: Path) -> str:
    path = folder / "content"
    path.write_bytes(content)
    return str(pooch.file_hash(str(path), alg="md5"))


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Five images in the place of MNIST: the content of each file by its name."""
    labels = np.arange(5, dtype=np.uint8)
    contents, files = {}, {}
    for field, values in (
        ("train", IMAGES),
        ("train_labels", labels),
        ("test", IMAGES),
        ("test_labels", labels),
    ):
        published = getattr(idx.MNIST, field)
        content = idx_bytes(values)
        packed = gzip.compress(content, mtime=0)
        contents[published.name] = packed
        files[field] = published._replace(
            shape=values.shape,
            md5_gz=pooch_md5(packed, tmp_path),
            md5=pooch_md5(content, tmp_path),
        )
    monkeypatch.setattr(idx, "MNIST", idx.MNIST._replace(**files))
    return contents


def test_mnist_from_a_local_folder(small_mnist: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name, content in small_mnist.items():
        (tmp_path / "mnist" / name).write_bytes(content)
    data = datasets.load("mnist", data_dir=tmp_path)
    check_dataset(data)
    np.testing.assert_allclose(data.train, IMAGES.reshape(5, -1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.test_labels, np.arange(5))


# ------------------------------------------------------------------ downloads


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


class Host:
    """Stands in for pooch's downloader and the host behind it."""

    def __init__(self, contents: dict[str, bytes] | None) -> None:
        self.contents = contents
        self.urls: list[str] = []

    def __call__(self, url: str, output_file: str, _: object) -> None:
        self.urls.append(url)
        if self.contents is None:
            import requests

            raise requests.exceptions.ConnectionError("host unreachable")
        Path(output_file).write_bytes(self.contents[url.rpartition("/")[2]])


def install(monkeypatch: pytest.MonkeyPatch, host: Host) -> Host:
    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **_: host)
    return host


def test_mnist_is_downloaded_once(
    small_mnist: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = install(monkeypatch, Host(small_mnist))
    first = datasets.load("mnist", cache_dir=tmp_path / "cache")
    second = datasets.load("mnist", cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(first.train, second.train)
    assert len(host.urls) == 4
    assert all(url.startswith(idx.MNIST.url) for url in host.urls)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_failed_download(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = install(monkeypatch, Host(None))
    with pytest.raises(datasets.DataError) as error:
        datasets.load(name, cache_dir=tmp_path)
    url = getattr(idx, name.upper()).url
    for part in (url, "host unreachable", str(tmp_path), "--data-dir", "KFGN_DATA_DIR"):
        assert part in str(error.value)
    assert len(host.urls) == 4  # once, and three times more


@pytest.mark.usefixtures("no_waiting")
def test_download_with_a_wrong_checksum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Host({"x.gz": b"a login page of some hotel"}))
    with pytest.raises(datasets.DataError, match=r"https://host/x\.gz.*MD5 hash.*does not match"):
        fetch("https://host/x.gz", "0" * 32, tmp_path)
    assert list(tmp_path.glob("x.gz")) == []


def test_download_that_is_too_long() -> None:
    """Whether its length is announced or not; what is as long as it may be comes whole."""
    limit = SizeLimit(2048)
    with pytest.raises(ValueError, match="larger than 2048 bytes"):
        limit.total = 2049
    limit = SizeLimit(2048)
    limit.update(1024)
    limit.update(1024)
    with pytest.raises(ValueError, match="larger than 2048 bytes"):
        limit.update(1024)
    limit.reset()
    limit.update(2048)


# ------------------------------------------------------------------ the real data


@needs_real_data
def test_real_mnist() -> None:
    data = datasets.load("mnist", data_dir=REAL_DATA_DIR)
    check_dataset(data)
    assert data.train.shape == (50_000, 784)
    assert data.test.shape == (10_000, 784)
    assert abs(data.train.mean(dtype=np.float64) * 255 - 33.3) < 0.2


@needs_real_data
def test_real_fashion_mnist() -> None:
    data = datasets.load("fashion_mnist", data_dir=REAL_DATA_DIR)
    check_dataset(data)
    assert data.train.shape == (60_000, 784)
    assert data.train_labels is not None
    assert (np.bincount(data.train_labels) == 6000).all()


@needs_real_data
def test_real_faces_come_near_the_published_figure(tmp_path: Path) -> None:
    assert REAL_DATA_DIR is not None
    data = faces.load(Path(REAL_DATA_DIR), tmp_path, pairs=20)
    check_dataset(data)
    assert abs(pca_test_error(data.train, data.test, 30) - 135) < 4
