"""The examples of CONTRIBUTING.md run as they stand, and are as short as it says."""

from __future__ import annotations

import re

import pytest

from kfgn.curvature.methods import METHODS
from tests.documents.pages import ROOT, blocks_of

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


@pytest.fixture
def registries():
    """What the examples register is forgotten after them."""
    methods = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(methods)


@pytest.mark.loose_dtypes  # as a reader's own session has it
@pytest.mark.usefixtures("registries")
def test_examples_run_and_are_short():
    text = CONTRIBUTING.read_text()
    sections = re.findall(r"^### (.*?)\n(.*?)(?=^###|\Z)", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in sections] == [
        "A primitive", "A layer kind", "A loss", "A curvature method", "A damping rule", "A solver",
    ]  # fmt: skip
    scope: dict[str, object] = {}
    for name, section in sections:
        blocks = [code for code, _ in blocks_of(section)]
        assert blocks, name
        lines = [
            x for x in blocks[0].splitlines() if x.strip() and not x.startswith(("import", "from"))
        ]
        assert len(lines) <= 20, (name, len(lines))
        for block in blocks:
            exec(compile(block, f"CONTRIBUTING.md, {name}", "exec", dont_inherit=True), scope)
