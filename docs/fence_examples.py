"""For griffe: the `>>>` examples of docstrings are code, not quotations of Markdown."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.MULTILINE)


def fenced(found: re.Match[str]) -> str:
    """The lines of an example as a block of code."""
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"


class FenceExamples(griffe.Extension):
    """Puts fences around every run of lines that begins with `>>>`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of one object's docstring."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)
