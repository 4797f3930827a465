"""Pages whose Python blocks run as they stand, one after another, in a namespace of the page."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"


def blocks_of(text: str) -> list[tuple[str, str | None]]:
    """The Python blocks, with the block of text that stands below, which is what each prints."""
    found = re.findall(
        r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, re.DOTALL | re.MULTILINE
    )
    return [(code, printed or None) for code, printed in found]


def run(path: Path) -> dict[str, Any]:
    """Runs a page, and gives what it defined."""
    scope: dict[str, Any] = {"__name__": path.stem}
    for code, expected in blocks_of(path.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(path.relative_to(ROOT)), "exec", dont_inherit=True), scope)
        lines = [line.rstrip() for line in printed.getvalue().splitlines()]
        assert expected is None or lines == expected.splitlines(), printed.getvalue()
    return scope
