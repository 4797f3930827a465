"""How often factors are looked at, and inverted."""

from typing import NamedTuple

import jax.numpy as jnp

from kfgn.base.checks import check_whole
from kfgn.base.errors import OptionError
from kfgn.base.types import Array
from kfgn.optimizers.state import Count, Flag


class Periods(NamedTuple):
    """Updates between looks at the factors, inversions of them, and adaptions of both dampings."""

    refresh_factors_every: Count
    refresh_inverse_every: Count
    step_damping_period: Count
    factor_damping_period: Count


def check_period(name: str, value: int | Array | str) -> None:
    """Raises OptionError unless it is a whole number of at least 1."""
    if isinstance(value, str) and value == "auto":
        raise OptionError(
            f'{name}="auto" is for kfgn.kfra, kflr, kfac and make, which know the costs: expected '
            "a number here, such as kfgn.inspect(objective, params, batch).totals.periods[method]"
        )
    check_whole(name, value, 1, traced=True)


def observation_due(count: Count, every: int | Array) -> Flag:
    """Whether factors are looked at after `count` updates: at the first ten, and every so often."""
    return (count < 10) | _is_due(count, every)


def inversion_due(count: Count, every: int | Array) -> Flag:
    """Whether they are inverted: every so often, and at the first five, if no more are so often."""
    return (count < jnp.minimum(every, 5)) | _is_due(count, every)


def _is_due(count: Count, every: int | Array) -> Flag:
    # In a long first period at every power of two: the average moves fastest at the start.
    return (count % every == 0) | ((count < every) & (count & (count - 1) == 0))
