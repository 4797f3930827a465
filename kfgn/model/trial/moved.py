"""What moved between two runs of a model, in numbers and in words."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

Outputs = dict[str, np.ndarray]  # by name, a row per example


def moved_beside(changed: list[int], before: Outputs, after: Outputs, values: str) -> str | None:
    """Which outputs of other examples than the changed ones moved, in words."""
    for name, a in before.items():
        for k in set(range(len(a))).difference(changed):
            change, scale = change_of(a[k], after[name][k])
            if change > _tolerance(a.dtype) * scale:
                return (
                    f"with {values}, {output_name(name)} of example {k} {moved(change, scale)} "
                    f"when the input of {_named(changed)} alone was changed"
                )
    return None


def output_name(name: str) -> str:
    return f"output {name!r}" if name else "the output"


def moved(change: float, scale: float) -> str:
    finite = f"moved by {change:.2g} (it reaches {scale:.2g})"
    return finite if change < math.inf else "turned finite or not"


def _named(changed: list[int]) -> str:
    return f"example{'s' * (len(changed) > 1)} {' and '.join(map(str, changed))}"


def change_of(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """By how much values moved, and how large they are."""
    kind = np.complex128 if np.iscomplexobj(before) else np.float64
    a, b = before.astype(kind), after.astype(kind)
    finite = np.isfinite(a) & np.isfinite(b)
    if np.any(np.isfinite(a) != np.isfinite(b)):
        return math.inf, np.max(np.abs(a[finite]), initial=0.0)
    a, b = a[finite], b[finite]
    return np.max(np.abs(a - b), initial=0.0), np.max(np.abs([a, b]), initial=0.0)


def _tolerance(dtype: Any) -> float:
    """The relative change that roundoff may make.

    An example's outputs mostly keep their bits: the same program runs. What
    sums in no fixed order, on some devices, moves them by some roundoff, and
    values inside may have fewer bits than the outputs.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return float(max(jnp.finfo(dtype).eps, jnp.finfo(jnp.float32).eps)) ** 0.5
