"""Checks of options: each raises OptionError where a number makes no sense.

An array is let through unchecked: it may be traced, and its value unknown.
"""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kfgn.base.errors import KfgnError, OptionError

DENSE_BYTES = 2**31  # the most that a single dense array may hold


def _check_of(expected: str, holds: Callable[[Any], bool]) -> Callable[[str, Any], None]:
    """A check `(name, value)` of a number; an array passes."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, numbers.Real):
            if holds(value):
                return
        elif hasattr(value, "dtype"):
            return
        found = repr(value)
        if callable(value):
            found = f"a {type(value).__name__}; wrap the transformation in optax.inject_hyperparams"
        raise OptionError(f"{name} must be {expected}, found {found}")

    return check


check_positive = _check_of("positive and finite", lambda x: 0 < x < math.inf)
check_not_negative = _check_of("finite and at least 0", lambda x: 0 <= x < math.inf)
check_fraction = _check_of("between 0 and 1", lambda x: 0 < x < 1)
_check_decay = _check_of("in [0, 1), or None for no average", lambda x: 0 <= x < 1)


def check_decay(name: str, value: Any) -> None:
    """Raises OptionError for a decay outside [0, 1); None stands for no average."""
    if value is not None:
        _check_decay(name, value)


def check_whole(
    name: str, value: Any, least: int, most: int | None = None, *, traced: bool = False
) -> None:
    """Raises OptionError unless the value is a whole number within bounds.

    An array is refused, unless it may be `traced`.
    """
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    within = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if within and least <= value and (most is None or value <= most):
        return
    found = repr(value)
    if hasattr(value, "dtype") and not within:
        if traced:
            return
        found += f', an array; under optax.inject_hyperparams give static_args="{name}"'
    raise OptionError(f"{name} must be a whole number {bounds}, found {found}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises OptionError unless the value is one of the choices."""
    known = list(choices)
    if value not in known:
        shown = ", ".join(x if isinstance(x, str) else repr(x) for x in known)
        raise OptionError(f"{name} must be one of {shown}, found {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises OptionError for anything but True and False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, found {value!r}")


def check_pair(name: str, value: Any) -> tuple[Any, Any]:
    """The members of a pair `(low, high)`; raises OptionError for anything else."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not in_order(*value):
        raise OptionError(f"{name} must be a pair (low, high) with low <= high, found {value!r}")
    return value[0], value[1]


def in_order(*values: Any) -> bool:
    """Whether the numbers among the values ascend."""
    known = [x for x in values if isinstance(x, numbers.Real)]
    return all(a <= b for a, b in itertools.pairwise(known))


def is_zero(value: Any) -> bool:
    """Whether the value is a number that is zero, for all that is known."""
    return isinstance(value, numbers.Real) and value == 0


def check_chunk_size(value: Any) -> None:
    """Raises OptionError unless so many examples can be worked on at once; None is all."""
    if value is not None:
        check_whole("chunk_size", value, 1)


def check_size(
    what: str,
    shape: tuple[int, ...],
    dtype: Any,
    remedy: str,
    *,
    most: int = DENSE_BYTES,
    error: type[KfgnError] = OptionError,
) -> None:
    """Raises an error where an array that is to be formed would hold more than so many bytes."""
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if needed > most:
        raise error(
            f"{what} would have {' x '.join(map(str, shape))} entries ({needed / 2**30:.1f} GiB); "
            f"the most that is formed is {most / 2**30:.0f} GiB. {remedy}"
        )
