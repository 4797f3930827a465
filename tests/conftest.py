"""Settings of all tests: strict dtypes everywhere, float64 where a test asks for it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

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
    config.addinivalue_line("markers", "row(parameter): what the tests of a row share is compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests of a row of a table, or else of a file, and compiles for them once.

    A test is of a row if it is marked `row` with the name of the parameter that names it;
    "a row with another loss" is of that row.
    """
    rows: list[pytest.Item] = []
    for item in items:
        group, mark = f"{item.path.parent.name}/{item.path.stem}", item.get_closest_marker("row")
        if mark and hasattr(item, "callspec") and mark.args[0] in item.callspec.params:
            group = f"{item.callspec.params[mark.args[0]]}".partition(" with ")[0]
            rows.append(item)
        item.add_marker(pytest.mark.xdist_group(group))
    # The many short groups come last, so that no worker waits for the others at the end.
    items.sort(key=set(rows).__contains__)


def pytest_collection_finish() -> None:
    """What is imported stays: garbage is looked for in what tests make, and not too often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()
