"""Settings of all tests: strict dtypes everywhere, float64 where a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


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
    config.addinivalue_line("markers", "loose_dtypes: allow implicit dtype promotion")
