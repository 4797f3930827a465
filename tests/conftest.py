"""Settings of all tests: strict dtypes everywhere, float64 where a test asks for it."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import pytest

# Beside no optimizations, these halve the time that XLA takes to compile.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

FOLDER = "kfgn-tests-"

# A program of its own: to import it would set x64 for all tests.
collect_ignore = ["optimizers/sharded_run.py"]


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit dtype promotion, unless a test is marked `loose_dtypes`."""
    if request.node.get_closest_marker("loose_dtypes"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test; the tests around it keep float32."""
    with jax.enable_x64(True):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Compiling, not running, takes the time of the tests: as little of it as can be.

    A folder for this run keeps what is compiled by the processes that tests start. The tests
    themselves compile next to nothing twice: to look would take longer than that.
    """
    gc.disable()  # till what is imported is frozen
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0.1,  # less is compiled as fast as read
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_traceback_in_locations_limit": 0,  # what is compiled need not tell where it is from
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    given = FOLDER not in os.environ["JAX_COMPILATION_CACHE_DIR"]  # the user's own
    jax.config.update("jax_enable_compilation_cache", given)
    if not hasattr(config, "workerinput"):  # workers are started with this process's environment
        flags = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        # An XLA that does not know a flag ends the process.
        if subprocess.run(command, env=flags, capture_output=True).returncode == 0:
            os.environ |= flags
    config.addinivalue_line("markers", "loose_dtypes: allow implicit dtype promotion")


#: Files whose tests share nothing, and those with tests of every row of a table.
ALONE = {"test_pages", "test_notebook"}
BY_ROW = {"test_every_model", "test_exact", "test_training", "test_architectures"}


@functools.cache
def group_of(test: str) -> str:
    """What one worker has all tests of, since they share what is compiled: a row, or a file.

    A test's id names its row; "a row with another loss" is of that row.
    """
    file, _, name = test.partition("::")
    stem = file.rpartition("/")[2].removesuffix(".py")
    if stem in ALONE:
        return test
    if stem in BY_ROW:
        for part in name.partition("[")[2].removesuffix("]").split("-"):
            row = part.partition(" with ")[0]
            if row in _rows():
                return row
    return file


@functools.cache
def _rows() -> set[str]:
    from tests.tables import architectures, nets, training_models

    return architectures.ROWS.keys() | nets.MODELS.keys() | training_models.TRAINING.keys()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups by their tests' ids; those that pytest-xdist marks are lost with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The many short groups come last, so that no worker waits for the others at the end."""
    items.sort(key=lambda item: group_of(item.nodeid) in _rows())


def pytest_collection_finish() -> None:
    """What is imported stays: garbage is looked for in what tests make, and not too often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()
