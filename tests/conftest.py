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
    config.addinivalue_line("markers", "row(parameter): what the tests of a row share is compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker has all tests of a row of a table, or else of a file, and compiles for them once.

    A test is of a row if it is marked `row` with the name of the parameter that names it.
    """
    for item in items:
        group, mark = f"{item.path.parent.name}/{item.path.stem}", item.get_closest_marker("row")
        if mark and hasattr(item, "callspec") and mark.args[0] in item.callspec.params:
            group = f"{item.callspec.params[mark.args[0]]}"
        item.add_marker(pytest.mark.xdist_group(group))
