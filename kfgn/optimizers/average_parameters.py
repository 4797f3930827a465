"""A moving average of the parameters, eq. (44)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import (
    check_decay,
)
from kfgn.base.errors import OptionError
from kfgn.base.types import Number, PyTree
from kfgn.optimizers.preconditioner import (
    moving_average,
)
from kfgn.optimizers.state import (
    Count,
    counter,
)


class AverageParametersState(NamedTuple):
    """State of `average_parameters`."""

    count: Count  # type: ignore[assignment]  # updates seen
    average: PyTree  # like params


def average_parameters(decay: Number = 0.95) -> optax.GradientTransformationExtraArgs:
    """Tracks `θ^ = β θ^ + (1 - β) θ`, `β = min(decay, 1 - 1/t)`, eqs. (44)-(45).

    The updates pass through; it must come last in a chain, so that it sees the
    step that is really taken. Read the average from the state's `average`.

    Args:
      decay: the greatest β.

    Raises:
      OptionError: a decay outside [0, 1); in `update`, no params.

    >>> import jax.numpy as jnp
    >>> tx, w = average_parameters(), jnp.array(0.0)
    >>> state = tx.init(w)
    >>> for _ in range(3):  # w is 1, 2, 3
    ...     step, state = tx.update(jnp.array(1.0), state, w)
    ...     w = w + step
    >>> float(state.average)
    2.0
    """
    check_decay("decay", decay)

    def init(params: PyTree) -> AverageParametersState:
        # A copy, so that params and state can both be donated.
        return AverageParametersState(counter(), jax.tree.map(jnp.array, params))

    def update(
        updates: PyTree, state: AverageParametersState, params: PyTree = None, **_: Any
    ) -> tuple[PyTree, AverageParametersState]:
        if params is None:
            raise OptionError("average_parameters needs params: call update(grads, state, params)")
        count = state.count + 1
        moved = optax.apply_updates(params, updates)
        average = moving_average(state.average, moved, count, decay)
        return updates, AverageParametersState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)
