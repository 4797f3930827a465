"""The pages run, name what there is, and have the code's own numbers."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

import kfgn
from tests.documents.pages import PAGES, ROOT, blocks_of, run

RUNNING = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *PAGES.rglob("*.md"))
    if blocks_of(path.read_text())
)
MODULES = [name for name in kfgn.__all__ if inspect.ismodule(getattr(kfgn, name))]


@pytest.mark.loose_dtypes  # as a reader's own session has it
@pytest.mark.parametrize("page", RUNNING)
def test_python_blocks_run(page):
    run(ROOT / page)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(path.read_text() for path in (PAGES / "reference").glob("*.md"))
    titles = "\n".join(re.findall(r"^(?:## |::: )(.*)$", text, re.MULTILINE))
    documented = set(re.findall(r"kfgn(?:\.\w+)+", titles))
    missing = []
    for owner in ("kfgn", "kfgn.curvature", *(f"kfgn.{name}" for name in MODULES)):
        module = importlib.import_module(owner)
        for name in module.__all__:
            value = getattr(module, name)
            # What `kfgn.curvature` shares with `kfgn` and `kfgn.layers` stands there.
            places = {f"{place}.{name}" for place in (owner, "kfgn", "kfgn.layers")}
            home = getattr(value, "__module__", "")  # errors have a page of their own
            if inspect.ismodule(value) or home == kfgn.errors.KfgnError.__module__:
                continue
            if not documented & places:
                missing.append(f"{owner}.{name}")
            # Beside a module of its name a function is found by its whole path only.
            package, _, last = home.rpartition(".")
            beside = last == name and name in importlib.import_module(package).__all__
            if beside and f"{home}.{name}" not in documented:
                missing.append(f"{home}.{name}")
    assert not missing


def test_every_error_is_explained():
    headings = re.findall(r"^## `(\w+)`$", (PAGES / "errors.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(kfgn.errors.__all__)


def test_options_table_has_the_defaults_of_the_code():
    text = (PAGES / "methods.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \|", text, re.MULTILINE)
    parameters = inspect.signature(kfgn.kfra).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    found = {}
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        if names[0] in options:
            values = ast.literal_eval(f"({defaults.replace('`', '')},)")
            found.update(zip(names, values, strict=True))
    assert found == options


def test_the_citation_is_of_this_version():
    assert f"\nversion: {kfgn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
