"""The README's Python blocks run as they stand, one after another."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kfgn.optimizers import alias

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
    options = dict(alias.optimizer.__kwdefaults__)
    found = {}
    for names, defaults in rows:
        names = re.findall(r"`(\w+)`", names)
        if names[0] in options:
            values = ast.literal_eval(f"({defaults.replace('`', '')},)")
            found.update(zip(names, values, strict=True))
    # One decay serves both dampings; the table leaves it to the docstring.
    assert found == {name: value for name, value in options.items() if name != "damping_decay"}
