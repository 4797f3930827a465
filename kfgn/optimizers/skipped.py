"""Updates that are skipped one after another, and how a user comes to hear of it."""

import itertools
import warnings
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import SkippedUpdatesWarning
from kfgn.optimizers.state import Count, Flag, counter


class _Streak(NamedTuple):
    """What a `SkippedStreak` holds."""

    skipped_in_a_row: Count  # up to now
    alarm: Flag  # whether they are too many


class SkippedStreak(_Streak):
    """How many updates in a row were skipped; a part of a state that speaks up.

    A compiled function that returns a state makes this tuple of its results, in
    Python and outside of the program: there the alarm is looked at, so that the
    program needs no callback, which would keep it from JAX's persistent compilation
    cache and cost 0.5 ms a call (40 arrays, measured on CPU). To wait for nothing
    that is not nearly done, the alarm of the call before is read, and every tenth
    call that of the call itself, for states whose buffers are donated.
    """

    __slots__ = ()

    def __new__(cls, skipped_in_a_row: Any, alarm: Any) -> Self:
        """The tuple; looks at earlier alarms, but not at what a comparison of states gives."""
        counts = jax.tree.leaves(skipped_in_a_row)
        if all(isinstance(n, jax.Array) and jnp.issubdtype(n.dtype, jnp.integer) for n in counts):
            _listen(alarm)
        return super().__new__(cls, skipped_in_a_row, alarm)


def no_streak() -> SkippedStreak:
    """Of a new state, with which alarms of earlier ones are over."""
    _before.clear()
    return SkippedStreak._make((counter(), jnp.zeros((), bool)))


def count_streak(old: Any, new: Any, warn_after: Any = 10) -> Any:
    """The new state with its streak: longer by one where it has skipped one more update."""
    length = jnp.where(new.skipped > old.skipped, old.streak.skipped_in_a_row + 1, 0)
    alarm = old.streak.alarm & (length > 0)
    if warn_after is not None:
        alarm = alarm | (length >= warn_after)
    return new._replace(streak=SkippedStreak(length, alarm))


_calls = itertools.count(1)
_before: list[jax.Array] = []


def _listen(alarm: Any) -> None:
    found = jax.tree.leaves(alarm)  # which a container of nnx may hold
    if len(found) != 1 or not isinstance(found[0], jax.Array):
        return
    if isinstance(found[0], jax.core.Tracer):
        return
    heard, _before[:] = list(_before), found
    if next(_calls) % 10 == 0:
        heard += found
    if any(_rings(x) for x in heard if not x.is_deleted()):
        _before.clear()
        warnings.warn(
            "optimizer updates were skipped one after another: the gradient, the curvature or the "
            "step has numbers that are not finite, so that neither params nor state change. Look "
            "at objective(params, batch) and its gradient, with JAX_DEBUG_NANS=True; "
            "kfgn.diagnostics.record(state) counts the skipped updates, warn_after_skipped=None "
            "silences this.",
            SkippedUpdatesWarning,
            stacklevel=4,
        )


def _rings(alarm: jax.Array) -> bool:
    return bool(np.any(np.asarray(alarm.addressable_data(0))))
