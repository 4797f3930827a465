"""What command lines are read with: a parser of one-line errors, and types of arguments."""

import argparse
import ast
import difflib
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import BenchmarkError

RESULTS = Path("benchmarks/results")


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad command line like every other error, in one line and without the usage."""

    def error(self, message: str) -> NoReturn:
        raise BenchmarkError(message)


def options(
    name: str,
    doc: str | None,
    *,
    seeded: bool = True,
    data: bool = True,
    resumable: bool = False,
    out: Path | None = None,
) -> OneLineParser:
    """A parser with the options of experiments: --out, and --seed, --data-dir, --resume."""
    parser = OneLineParser(prog=f"python -m benchmarks {name}", description=doc, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=out or RESULTS / name, help="where the results go")
    if seeded:
        add("--seed", type=seed_int, default=0, help="of parameters and batches (0)")
    if data:
        add("--data-dir", type=Path, help="read the data's files here")
    if resumable:
        add("--resume", action="store_true", help="go on after an interruption")
    return parser


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """The options, as the record has them: without those that change nothing that is measured."""
    return {k: v for k, v in vars(given).items() if k not in ("data_dir", "out", "resume")}


def all_seeds(given: argparse.Namespace) -> range:
    """`--seeds` of them, from `--seed` on."""
    return range(given.seed, given.seed + given.seeds)


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """What to say of an unknown name: the known name it is most like, and all of them."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    return f"no {kind} {name!r}{hint} (known: {', '.join(known)})"


def one_of(kind: str, known: Collection[str]) -> Callable[[str], str]:
    """The type of a known name."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(unknown(kind, text, known))
        return text

    return parse


def some_of(kind: str, known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of different known names with commas between them, one at least."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(name.strip() for name in text.split(",") if name.strip())
        if not found:
            raise argparse.ArgumentTypeError(f"takes some of {', '.join(known)}, with commas")
        for name in found:
            if found.count(name) > 1:
                raise argparse.ArgumentTypeError(f"names {name} twice")
        return tuple(map(one_of(kind, known), found))

    return parse


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


def finite(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


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


def up_to(most: float) -> Callable[[str], tuple[float, ...]]:
    """The type of numbers above 0 and up to `most`, with commas between them."""

    def parse(text: str) -> tuple[float, ...]:
        found = tuple(positive_number(part) for part in text.split(","))
        if max(found) > most:
            raise argparse.ArgumentTypeError(f"must be numbers up to {most:g}, not {text!r}")
        return found

    return parse


def widths(text: str) -> tuple[int, ...]:
    """Layer widths, with commas between them."""
    return tuple(positive_int(width.strip()) for width in text.split(","))


def wholes(text: str) -> tuple[int, ...]:
    """Different whole numbers, with commas between them, in their order."""
    return tuple(sorted({whole(part.strip()) for part in text.split(",")}))


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
