"""The factors' moving average, and when it looks at a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.errors import OptionError
from kfgn.base.types import Array, Named, Number
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.periods import observation_due
from kfgn.optimizers.preconditioner import Preconditioner, factors_of, moving_average
from kfgn.optimizers.state import Count, Flag, all_finite, keep_if


class Observed(NamedTuple):
    """The factors' average after an update."""

    factors: Named
    times: Count  # it has seen factors
    usable: Flag  # whether the batch is: false where its factors were seen and are not finite


def observe(
    curvature: Curvature,
    before: Observed,
    updates: Count,
    every: int | Array,
    decay: Number | None,
    preconditioner: Preconditioner,
    leaves: Named,
) -> Observed:
    """The average with the factors of a batch, which are computed only where that is due.

    They are due at the first ten updates and at every so many, if the batch is usable so far.
    The loop, of no turn or one, copies nothing of what passes through it, as a conditional
    would, and stays a loop under `jax.vmap`.
    """

    def once(_: Any) -> tuple[Flag, Observed]:
        new = factors_of(curvature, preconditioner.blocks.present(leaves), preconditioner.two_term)
        if preconditioner.two_term:
            _require_alike(new, before.factors)
        usable = before.usable & all_finite(new)
        times = before.times + 1
        new = preconditioner.arranged(new, leaves)
        average = moving_average(before.factors, new, times, decay)
        factors, times = keep_if(usable, (average, times), before[:2])
        return jnp.array(False), Observed(factors, times, usable)

    if isinstance(every, int) and every == 1:
        return once(None)[1]
    due = before.usable & observation_due(updates, every)
    return jax.lax.while_loop(lambda carry: carry[0], once, (due, before))[1]


def _require_alike(new: Named, known: Named) -> None:
    """Raises OptionError where a curvature has merged what an optimizer keeps in two terms."""
    for name, factors in new.items():
        if not isinstance(factors, type(known[name])):
            raise OptionError(
                f'inverse="two-term" needs the terms of layer {name!r} apart, and the curvature '
                "has them merged: pass what kfgn.value_grad_and_curvature returned, or the "
                "average of such, without with_factors or multi_steps"
            )
