"""How results are written down: with the command, the versions and the machine, as whole files."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import jax
import optax

import kfgn
from benchmarks import BenchmarkError


def heading(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What every record begins with: the command that measures the same again, and where it ran."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in ("--out", "--data-dir"):
            next(rest, None)
        elif argument != "--resume" and not argument.startswith(("--out=", "--data-dir=")):
            kept.append(argument)
    return {"command": " ".join(["python -m benchmarks", name, *kept]), **environment()}


def environment() -> dict[str, Any]:
    """What a result should be read with."""
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "kfgn": kfgn.__version__,
    }


def cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says in one line that results cannot be written."""
    try:
        yield
    except OSError as error:
        raise BenchmarkError(f"cannot write results to {place}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Writes it so that a reader never sees half a file."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def _finite(measured: Any) -> Any:
    """The same with null for what JSON cannot say: a number that is not finite."""
    if isinstance(measured, Mapping):
        return {key: _finite(value) for key, value in measured.items()}
    if isinstance(measured, (list, tuple)):
        return [_finite(value) for value in measured]
    return None if isinstance(measured, float) and not math.isfinite(measured) else measured


def write_rows(path: Path, name: str, arguments: Sequence[str], rows: Sequence[Any]) -> None:
    """The one file of a command that measures rows, named tuples."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**heading(name, arguments), "rows": [row._asdict() for row in rows]})
