"""kfac-jax in an environment of its own: made once, kept with the cached data.

Its releases and jax's do not always fit, and kfgn should not choose its jax by them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.datasets.base import resolve_cache_dir
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.race import Point

RELEASE = "kfac-jax==0.0.8"
# The latest jax that this release runs with: later ones changed how primitives are bound.
REQUIRED = (RELEASE, "jax==0.8.2", "jaxlib==0.8.2")
DAMPINGS = (3.0, 150.0)  # at the start: one that suits this loss, and its example's
INSTALLING = 900.0  # seconds at most
MOST_UPDATES = 3000  # whose batches are written down; then they come round again


class Skipped(Exception):
    """Why kfac-jax was not run."""


def environment(folder: Path | None = None) -> Path:
    """The Python of an environment with kfac-jax; raises Skipped where there can be none."""
    home = folder or resolve_cache_dir(None) / "-".join(REQUIRED).replace("==", "-")
    python = home / "bin" / "python"
    if python.exists() and _runs(python):
        return python
    try:
        venv.create(home, with_pip=True, clear=True)
        _call([str(python), "-m", "pip", "install", "--quiet", *REQUIRED], INSTALLING)
    except (OSError, subprocess.SubprocessError) as error:
        raise Skipped(f"cannot be installed: {_said(error)}") from error
    if not _runs(python):
        raise Skipped(f"{RELEASE} cannot be imported with the jax it was installed with")
    return python


def kfac_jax_run(
    images: np.ndarray,
    params: Any,
    loss: str,
    damping: float,
    seed: int,
    options: Any,
    evaluated: int,
) -> tuple[list[Point], dict[str, str]]:
    """Points and versions of a training from a damping, on the batches of the other runs.

    Raises:
      Skipped: there is no environment, or kfac-jax failed in it.
    """
    python = environment()
    with tempfile.TemporaryDirectory() as folder:
        problem, settings = Path(folder) / "problem.npz", Path(folder) / "settings.json"
        batches = _batches(len(images), options.batch_size, seed)
        arrays: dict[str, Any] = {"images": images, "batches": batches}
        np.savez(problem, **arrays, **_flat(params))
        given = {
            "loss": loss, "l2": options.l2, "damping": damping, "seed": seed,
            "seconds": options.seconds, "evaluated": evaluated,
        }  # fmt: skip
        settings.write_text(json.dumps(given))
        script = str(Path(__file__).with_name("train_kfac_jax.py"))
        arguments = [str(python), script, str(problem), str(settings)]
        try:
            said = json.loads(_call(arguments, 600 + 20 * options.seconds).splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            raise Skipped(f"fails: {_said(error)}") from error
    return [Point(*point) for point in said["points"]], said["versions"]


def _batches(count: int, size: int, seed: int) -> np.ndarray:
    """The indices of the batches that `race.batches` gives, `[updates, batch]`."""
    drawn = draw_batches(np.arange(count, dtype=np.int32), size, seed=seed)
    return np.stack([batch for batch, _ in itertools.islice(drawn, MOST_UPDATES)])


def _flat(params: Any) -> dict[str, Any]:
    """Kernels and biases in the order of the layers, which flax counts."""
    layers = jax.device_get(params)["params"]
    named = {}
    for name, layer in layers.items():
        number = int(name.rpartition("_")[2])
        named[f"kernel{number}"], named[f"bias{number}"] = layer["kernel"], layer["bias"]
    return named


def _runs(python: Path) -> bool:
    try:
        _call([str(python), "-c", "import kfac_jax"], 120)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _call(command: list[str], seconds: float) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=seconds
    ).stdout


def _said(error: Exception) -> str:
    """The error that a failed process ended with, or else its last line."""
    text = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or lines or [type(error).__name__])[-1]
