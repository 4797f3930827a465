"""The README's Python blocks run as they stand, one after another."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import kfgn

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.loose_dtypes  # as a reader's own session has it
def test_python_blocks_run():
    text = README.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)


def test_options_table_has_the_defaults_of_the_code():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \|", README.read_text(), re.MULTILINE)
    parameters = inspect.signature(kfgn.kfra).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    found = {}
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        if names[0] in options:
            values = ast.literal_eval(f"({defaults.replace('`', '')},)")
            found.update(zip(names, values, strict=True))
    assert found == options
