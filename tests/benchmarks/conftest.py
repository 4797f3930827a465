"""Settings of the benchmarks' tests, which spend most of their time in XLA's compiler."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compile_quickly_and_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Few optimizations, and one cache: many of these tests run the same programs."""
    settings: dict[str, object] = {"jax_disable_most_optimizations": True}
    if not jax.config.jax_compilation_cache_dir:
        settings |= {
            "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
