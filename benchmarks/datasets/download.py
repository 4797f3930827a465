"""Downloads with checksums and retries, kept in the cache folder by pooch."""

from __future__ import annotations

from pathlib import Path

import pooch

from .base import DATA_DIR_VARIABLE, DataError, data_error

RETRIES = 3
LARGEST = 2**26  # bytes of a file, of which the largest published one has 26 million
TIMEOUT_SECONDS = 30.0


def fetch(url: str, md5: str, folder: Path, *, retries: int = RETRIES) -> Path:
    """The local path of `url`, downloaded unless `folder` holds it with this md5 already."""
    name = url.rpartition("/")[2]
    source = pooch.create(
        path=folder,
        base_url="",
        registry={name: f"md5:{md5}"},
        urls={name: url},
        retry_if_failed=retries,
    )
    try:
        get = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS, progressbar=SizeLimit(LARGEST))
        return Path(source.fetch(name, downloader=get))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: the md5
        raise download_error(url, folder, error) from error


class SizeLimit:
    """A progress bar, as pooch takes one, that ends a download which is too long.

    Raises:
      ValueError: so many bytes are announced, or have come.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0

    def __setattr__(self, name: str, value: int) -> None:
        if name == "total":  # as pooch sets it when it begins, again where it has failed
            self.reset()
        object.__setattr__(self, name, value)
        if name in ("total", "seen") and value > self.most:
            raise ValueError(f"the file is larger than {self.most} bytes")

    def update(self, more: int) -> None:
        self.seen += more

    def reset(self) -> None:
        self.seen = 0

    close = reset


def download_error(url: str, folder: Path, cause: BaseException) -> DataError:
    """The DataError of a failed download of `url` into `folder`."""
    return data_error(
        url,
        f"no usable download ({type(cause).__name__}: {cause})",
        f"the file, to be kept in {folder}",
        f"name a folder that holds the data with --data-dir or {DATA_DIR_VARIABLE}, "
        "or try again with a network (and a writable cache folder: --cache-dir, KFGN_CACHE_DIR)",
    )
