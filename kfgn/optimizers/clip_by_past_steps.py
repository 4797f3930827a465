"""A bound on steps by the lengths of those before, for where single batches make long ones."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_decay, check_positive
from kfgn.base.errors import OptionError
from kfgn.base.types import Array, Number, PyTree, Scalar
from kfgn.optimizers.state import Count, counter, number


class ClipByPastStepsState(NamedTuple):
    """State of `clip_by_past_steps`."""

    count: Count  # type: ignore[assignment]  # updates that were steps: finite, and not zero
    clipped: Count  # those that were made shorter
    length: Scalar  # the decaying sum of their lengths, whose weights add up to 1 - decay^count


def clip_by_past_steps(factor: Number = 2.0, decay: Number = 0.9) -> optax.GradientTransformation:
    """Shortens an update to `factor` times the mean length of those before.

    With `m_k = (1 - β) sum_i β^(k-i) |d_i| / (1 - β^k)`, `|d_(k+1)| <= factor m_k`, from update
    `1 / (1 - β)` on; before that nothing is known. Steps may grow and shrink as training has
    it, but none is far longer than its like: where classifiers fit their training set, steps
    that fit one batch are, and undo what all others taught. Put it last in a chain.

    Args:
      factor: how many times the mean a step may be, above 1 if steps are to grow.
      decay: β, of the mean.

    Returns:
      The transformation. Updates that are zero or not finite pass, and count for nothing.

    Raises:
      OptionError: an option out of its range.

    >>> import jax.numpy as jnp
    >>> tx = clip_by_past_steps(2.0, decay=0.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> for update in ([3.0, 4.0], [30.0, 40.0]):
    ...     step, state = tx.update(jnp.array(update), state)
    >>> step.tolist(), int(state.clipped)
    ([6.0, 8.0], 1)
    """
    check_positive("factor", factor)
    if decay is None:
        raise OptionError("decay must be a number in [0, 1), found None")
    check_decay("decay", decay)

    def init(params: PyTree) -> ClipByPastStepsState:
        del params
        return ClipByPastStepsState(counter(), counter(), number())

    def update(
        updates: PyTree, state: ClipByPastStepsState, params: PyTree = None, **_: Any
    ) -> tuple[PyTree, ClipByPastStepsState]:
        del params
        beta = jnp.asarray(decay, jnp.float32)
        length = _length(jax.tree.leaves(updates))
        counts = jnp.isfinite(length) & (length > 0)
        seen = state.count.astype(jnp.float32)
        known = (seen >= 1) & (seen * (1 - beta) >= 1 - 1e-3)
        bound = factor * state.length / jnp.where(known, 1 - beta**seen, 1)
        clips = counts & known & (length > bound)
        share = jnp.where(clips, bound / jnp.where(clips, length, 1), 1)
        mean = beta * state.length + (1 - beta) * share * jnp.where(counts, length, 0)
        after = ClipByPastStepsState(
            state.count + counts.astype(jnp.int32),
            state.clipped + clips.astype(jnp.int32),
            jnp.where(counts, mean, state.length),
        )
        return jax.tree.map(lambda x: share.astype(x.dtype) * x, updates), after

    return optax.GradientTransformationExtraArgs(init, update)


def _length(leaves: list[Array]) -> Scalar:
    """The Euclidean norm, of numbers as well whose squares are too large or small."""
    arrays = [x.astype(jnp.float32) for x in leaves]
    largest = functools.reduce(
        jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in arrays), number()
    )
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(sum((jnp.sum(jnp.square(x / scale)) for x in arrays), start=number()))
