"""Inverses refreshed a few blocks at a time, so that no update costs much more than another."""

from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_flag, check_whole
from kfgn.base.errors import OptionError
from kfgn.base.types import Array, Named, Scalar
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.state import Count, Flag


def check_stagger(stagger: Any, every: Any, sharding: Any, candidates: int = 1) -> None:
    """Raises OptionError where blocks cannot take turns."""
    check_flag("stagger", stagger)
    if not stagger:
        return
    check_whole("refresh_inverse_every with stagger=True", every, 1)
    if sharding is not None:
        raise OptionError(
            "stagger=True refreshes the inverses of whole blocks in turn, factor_sharding those of "
            "all blocks on several devices; give one of them."
        )
    if candidates > 1:
        raise OptionError(
            "stagger=True needs a factor_damping that does not search, which inverts all factors "
            "at once; give factor_damping=None, or kfgn.transforms.Fixed."
        )


def in_turns(factors: Named, every: int) -> list[list[str]]:
    """The names of blocks in so many parts, whose inversions are about the same work."""
    work = {
        name: sum(x.size * x.shape[-1] for x in jax.tree.leaves(block) if x.ndim > 1)
        for name, block in factors.items()
    }
    parts: list[list[str]] = [[] for _ in range(every)]
    loads = [0] * every
    for name in sorted(work, key=lambda n: -work[n]):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += work[name]
    return parts


def refresh_in_turns(
    preconditioner: Preconditioner,
    factors: Named,
    known: tuple[Named, Any],
    damping: Scalar,
    count: Count,
    every: int,
    usable: Flag | Array,
) -> tuple[Named, Any]:
    """The inverses, of which each part is refreshed at one update of `every`, all at the first.

    `known` are those so far, and the factors' extremes, which become those of the last part.
    """
    inverses, extremes = known
    found: Named = {}
    for i, names in enumerate(in_turns(factors, every)):
        mine, old = ({n: x[n] for n in names} for x in (factors, inverses))
        due = usable & ((count == 0) | (count % every == i))

        def once(carry: Any, mine: Named = mine) -> Any:
            parts = preconditioner.decompose(mine, carry[1], jnp.array(True))
            inverted = preconditioner.invert(parts, damping)
            return jnp.array(False), inverted, preconditioner.extremes(parts, damping)

        if names:
            _, own, extremes = jax.lax.while_loop(lambda c: c[0], once, (due, old, extremes))
            found |= own
    return {name: found[name] for name in inverses}, extremes
