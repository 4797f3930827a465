"""Q: the second moments of what a layer's kernels are applied to, of all positions or of their sum.

The rows of an example's positions are much alike, and convolutions have thousands in a batch: as
many examples as Q needs may stand for it (see `examples_for`).
"""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.diagonals import on_diagonals
from kfgn.base.linalg import map_examples, sum_over_examples, total, weighed
from kfgn.base.types import Array
from kfgn.curvature.factors import (
    Moments,
    is_one_row,
    moment,
    of_both_sides,
    sharing_of,
)
from kfgn.curvature.weights import Weights
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use

#: Values, roots of importance and `route` of some examples.
_Chunk: TypeAlias = tuple[Array, Array | None, Array | None]
#: Positions of one example are alike: Q is never of fewer examples.
_LEAST = 64


class Inputs(NamedTuple):
    """What a use is applied to."""

    values: Float[Array, "n ..."]
    importance: Float[Array, " n"] | None  # of the examples, where they differ
    route: Float[Array, "n s t"] | None = None  # what rows are multiplied by, 0 where none counts

    @property
    def roots(self) -> Float[Array, " n"] | None:
        return None if self.importance is None else jnp.sqrt(self.importance)


def examples_for(layer: Layer, use: Use, rows: int | None, sharing: str) -> int | None:
    """How many examples have so many positions for each row of Q; None for all there are."""
    alone = use.form.positions == 1 or use.choice is not None or use.form.indexed
    if rows is None or alone or sharing_of(layer, sharing) == "reduce":
        return None
    return max(-(-rows * use.width // use.form.positions), _LEAST)


def activation_moments(
    layer: Layer,
    seen: dict[str, Inputs],
    sharing: str,
    dtype: Any,
    weights: dict[str, Weights],
) -> Moments:
    """Q, from what every use is applied to, by its name."""

    def of(slot: dict[str, Use], blocks: int) -> Array:
        if sharing_of(layer, sharing) == "expand" and all(u.form.indexed for u in slot.values()):
            counts = _counts(layer, slot, seen, dtype, weights)
            return counts if layer.indexed else on_diagonals(counts, blocks)
        if sharing_of(layer, sharing) == "reduce":
            count = sum(use.form.positions for use in slot.values())
            pooled = {n: weighed(seen[n].roots, _pooled(use, seen[n], dtype))
                      for n, use in slot.items()}  # fmt: skip
            rows = {n: a * weights[n].rows[:, None] if n in weights else a
                    for n, a in pooled.items()}  # fmt: skip
            return moment(total(rows.values()) / count, blocks)
        return total(_in_chunks(u, seen[n], dtype, weights.get(n), blocks)
                     for n, u in slot.items())  # fmt: skip

    return of_both_sides(layer, 0, of)


def _bytes_each(use: Use, dtype: Any) -> int:
    """What the inputs of a use take for one example: a convolution's patches repeat its data."""
    form = use.form
    return form.groups * form.positions * use.width * jnp.dtype(dtype).itemsize


def _in_chunks(
    use: Use,
    seen: Inputs,
    dtype: Any,
    weights: Weights | None,
    blocks: int,
) -> Float[Array, "s d d"]:
    """The second moment of a use's inputs, with roots of weights if there are any."""

    def of_chunk(chunk: _Chunk) -> Array:
        values, roots, route = chunk
        rows = use.activations(values, dtype)
        if weights is not None:
            rows = rows * weights.rows[:, None]
        if route is not None:
            rows = rows * route[..., None]
        return moment(weighed(roots, rows), blocks)

    def summed(chunk: _Chunk) -> Array:
        return of_chunk(chunk) * chunk[0].shape[0]

    whole = seen.values, seen.roots, seen.route
    if use.form.positions == 1 or use.choice is not None:  # no larger than the data
        return of_chunk(whole)
    return sum_over_examples(summed, whole, _bytes_each(use, dtype)) / seen.values.shape[0]


def _pooled(use: Use, seen: Inputs, dtype: Any) -> Float[Array, "N s 1 d"]:
    """A use's inputs summed over its positions."""

    def one(known: tuple[Array, Array | None]) -> Array:
        value, route = known
        rows = use.activations(value[None], dtype)[0]
        rows = rows if route is None else rows * route[..., None]
        return jnp.sum(rows, axis=1, keepdims=True)

    at_once = max(1, 2**26 // _bytes_each(use, dtype))
    return map_examples(one, (seen.values, seen.route), at_once)


def _counts(
    layer: Layer,
    slot: dict[str, Use],
    seen: dict[str, Inputs],
    dtype: Any,
    weights: dict[str, Weights],
) -> Float[Array, "s d_in"]:
    """How often each row is looked up per example, the diagonal of "expand"'s Q."""
    if is_one_row(layer):  # "reduce", whose G has the factor in it
        return jnp.ones((1, 1), dtype)
    counts = nothing = jnp.zeros((layer.first.form.groups, layer.activation_size), dtype)
    for name, use in slot.items():
        found = use.form.activations(seen[name].values)
        weight = jnp.full(found.shape, use.kernel.factor**2 / found.shape[0], dtype)
        group = jnp.arange(found.shape[1])[:, None]
        weight = weight if (own := seen[name].route) is None else weight * own**2
        own = nothing.at[group, found].add(weighed(seen[name].importance, weight))
        counts = counts + (own * weights[name].rows ** 2 if name in weights else own)
    return counts
