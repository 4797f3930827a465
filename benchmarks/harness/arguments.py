"""What command lines are read with: a parser of one-line errors, and types of arguments."""

import argparse
import ast
import math
from typing import Any, NoReturn

from benchmarks import BenchmarkError


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad command line like every other error, in one line and without the usage."""

    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(message)


def positive_int(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above zero, not {text!r}")
    return int(text)


def whole(text: str) -> int:
    """A whole number, zero or above."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, zero or above, not {text!r}")
    return int(text)


def seed_int(text: str) -> int:
    """A whole number that can seed a generator."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**32, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """A finite number, zero or above."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, zero or above, not {text!r}")
    return value


def positive_number(text: str) -> float:
    """A finite number above zero."""
    if number(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number above zero, not {text!r}")
    return number(text)


def parts(text: str) -> tuple[float, ...]:
    """Parts of a whole, above 0 and up to 1, with commas between them."""
    found = tuple(positive_number(part) for part in text.split(","))
    if max(found) > 1:
        raise argparse.ArgumentTypeError(f"must be parts of a whole, up to 1, not {text!r}")
    return found


def widths(text: str) -> tuple[int, ...]:
    """Layer widths, with commas between them."""
    return tuple(positive_int(width.strip()) for width in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names, with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def option(text: str) -> tuple[str, Any]:
    """``name=value``, the value a Python literal where it is one and a string elsewhere."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must look like name=value, not {text!r}")
    if value.lower() in ("true", "false", "none"):
        value = value.capitalize()
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
