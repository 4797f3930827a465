"""How results are written down: with the command, the versions and the machine, as whole files."""

from __future__ import annotations

import io
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
from matplotlib.figure import Figure
from PIL import Image

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


def write_json(path: Path, content: Any, **measured: Any) -> None:
    """Writes it so that a reader never sees half a file.

    What was measured comes last, to six digits and each in one line: results are kept for long.
    """
    lines = [json.dumps(_finite(content), indent=1, allow_nan=False).removesuffix("\n}")]
    for name, found in measured.items():
        short = json.dumps(_finite(found, 6), separators=(",", ":"), allow_nan=False)
        lines.append(f' "{name}": {short}')
    aside = path.with_suffix(".part")
    aside.write_text(",\n".join(lines) + "\n}\n")
    aside.replace(path)


def save_figure(path: Path, figure: Figure) -> None:
    """As a PNG of 64 colors, a quarter of the size."""
    image = io.BytesIO()
    figure.savefig(image, dpi=130)
    palette = Image.Quantize.FASTOCTREE  # keeps the colors of thin lines
    colors = Image.open(image).convert("RGB").quantize(64, palette, dither=Image.Dither.NONE)
    colors.save(path, optimize=True)


def _finite(measured: Any, digits: int = 17) -> Any:
    """The same with null for what JSON cannot say, a number that is not finite."""
    if isinstance(measured, Mapping):
        return {key: _finite(value, digits) for key, value in measured.items()}
    if isinstance(measured, (list, tuple)):
        return [_finite(value, digits) for value in measured]
    if not isinstance(measured, float):
        return measured
    return float(f"{measured:.{digits}g}") if math.isfinite(measured) else None


def write_rows(path: Path, name: str, arguments: Sequence[str], rows: Sequence[Any]) -> None:
    """The one file of a command that measures rows, named tuples."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, heading(name, arguments), rows=[row._asdict() for row in rows])
