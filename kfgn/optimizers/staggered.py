"""Inverses refreshed a few blocks at a time, so that no update costs much more than another."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_flag, check_whole
from kfgn.base.errors import OptionError
from kfgn.base.types import Array, Scalar
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.state import Count, Flag


def check_stagger(stagger: Any, every: Any, candidates: int = 1) -> None:
    """Raises OptionError where blocks cannot take turns."""
    check_flag("stagger", stagger)
    if not stagger:
        return
    check_whole("refresh_inverse_every with stagger=True", every, 1)
    if candidates > 1:
        raise OptionError(
            "stagger=True needs a factor_damping that does not search, which inverts all factors "
            "at once; give factor_damping=None, or kfgn.transforms.Fixed."
        )


def in_turns(factors: Mapping[Any, Any], every: int) -> list[list[Any]]:
    """Blocks by their names in so many parts, whose inversions are about the same work.

    The first part has the least: its update observes the factors, too, if they have that period.
    """
    work = {
        name: sum(x.size * x.shape[-1] for x in jax.tree.leaves(block) if x.ndim > 1)
        for name, block in factors.items()
    }
    parts: list[list[Any]] = [[] for _ in range(every)]
    loads = [0] * every
    for name in sorted(work, key=lambda n: -work[n]):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += work[name]
    return [parts[i] for i in sorted(range(every), key=loads.__getitem__)]


def refresh_in_turns(
    preconditioner: Preconditioner,
    factors: Any,
    known: tuple[Any, Any],
    damping: Scalar,
    count: Count,
    every: int,
    usable: Flag | Array,
) -> tuple[Any, Any]:
    """The inverses, of which each part is refreshed at one update of `every`, all at the first few.

    `known` are those so far, and the factors' extremes, which become those of the last part.
    """
    inverses, extremes = known
    for i, items in enumerate(in_turns(preconditioner.items(factors), every)):
        if not items:
            continue
        mine, old = (preconditioner.some(x, items) for x in (factors, inverses))
        due = usable & ((count < min(every, 5)) | (count % every == i))

        def once(carry: Any, mine: Any = mine) -> Any:
            parts = preconditioner.decompose(mine, carry[1], jnp.array(True))
            inverted = preconditioner.invert(parts, damping)
            return jnp.array(False), inverted, preconditioner.extremes(parts, damping)

        _, own, extremes = jax.lax.while_loop(lambda c: c[0], once, (due, old, extremes))
        inverses = preconditioner.put(inverses, own, items)
    return inverses, extremes
