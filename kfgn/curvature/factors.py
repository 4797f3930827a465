"""Kronecker factors of a layer's block, also where a kernel is shared over positions.

With `h_t = a_t W + b` at T positions per example, the block of the mean loss is
`E[sum_tu (a_t a_u') ⊗ (g_t g_u')]`. Two approximations make one Kronecker
product of it (Eschenhagen et al. 2023, section 3):

    expand:  Q = E[sum_t a_t a_t'],        G = E[sum_t g_t g_t'] / T;
    reduce:  Q = E[(sum_t a_t)(sum_t a_t)'] / T^2,   G = E[(sum_t g_t)(sum_t g_t)'].

Both are the same, and the paper's eqs. (21) and (25), where T is 1. The uses
of a tied kernel count as further positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kfgn.base.checks import check_choice
from kfgn.base.diagonals import cut, diagonal_blocks
from kfgn.base.linalg import (
    precision,
    second_moment,
    total,
)
from kfgn.base.types import Array
from kfgn.curvature.weights import Weights, on_both_sides
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.equations import size


class Factors(NamedTuple):
    """The Kronecker factors of one layer's block, `activation ⊗ pre_activation`.

    A leading axis `[S]` stacks the blocks of a layer with several slots or groups.
    The activations of a kernel with a bias end in 1, so that Q has a row more; Q of
    look-ups is diagonal, and kept as a vector.

    >>> import jax.numpy as jnp, kfgn
    >>> model = lambda p, x: x @ p["w"] + p["b"]
    >>> objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    >>> params, batch = {"w": jnp.eye(3), "b": jnp.ones(3)}, (jnp.ones((4, 3)), jnp.ones((4, 3)))
    >>> factors = kfgn.value_grad_and_curvature(objective)(params, batch)[1].factors["w"]
    >>> factors.activation.shape, factors.pre_activation.shape
    ((4, 4), (3, 3))
    """

    activation: Float[Array, "*S d_in d_in"] | Float[Array, "*S d_in"]  # Q, eq. (21)
    pre_activation: Float[Array, "*S d_out d_out"]  # G, eq. (25) or (26)


class TwoTerms(NamedTuple):
    """A sum of two Kronecker products, of a layer in several terms of a sum of objectives."""

    first: Factors
    second: Factors


class Diagonal(NamedTuple):
    """The exact diagonal of the Gauss-Newton matrix for a parameter in no layer.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: x * jnp.sum(p**2), kfgn.losses.half_squared_error)
    >>> curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr", unassigned="diagonal")
    >>> _, curvature = curvature_fn(jnp.array([3.0]), (jnp.ones((4, 1)), jnp.ones((4, 1))))
    >>> curvature.factors[""].diagonal.tolist()  # (2 p)²
    [36.0]
    """

    diagonal: Float[Array, "*shape"]  # the parameter's own


class Moments(NamedTuple):
    """One kind of factor: of the uses as the layer has them, and of those that are flipped."""

    upright: Float[Array, "*S d d"] | Float[Array, "*S d"]
    flipped: Float[Array, "*S d d"] | None = None


def check_sharing(sharing: str) -> None:
    """Raises OptionError for an unknown approximation of weight sharing."""
    check_choice("sharing", sharing, ("expand", "reduce"))


def gradient_moments(
    layer: Layer,
    gradients: dict[str, Array],
    sharing: str,
    dtype: Any,
    weights: dict[str, Weights],
) -> Moments:
    """G, from gradients `[N, ...]` at the pre-activations of every use by its name."""

    def of(slot: dict[str, Use], blocks: int) -> Array:
        rows = {n: use.pre_activations(gradients[n]).astype(dtype) for n, use in slot.items()}
        rows |= {n: weights[n].routed(g * weights[n].columns[:, None])
                 for n, g in rows.items() if n in weights}  # fmt: skip
        rows = {n: beside_bias(layer, layer.uses[n], g) for n, g in rows.items()}
        if sharing_of(layer, sharing) == "reduce":
            if layer.indexed:
                rows = {n: layer.uses[n].kernel.factor * g for n, g in rows.items()}
                rows |= {n: g * weights[n].rows[0, 0] for n, g in rows.items() if n in weights}
            return moment(total(jnp.sum(g, axis=2, keepdims=True) for g in rows.values()), blocks)
        count = total(_places(use, weights.get(n)) for n, use in slot.items())
        return total(moment(g, blocks) for g in rows.values()) / count

    return of_both_sides(layer, 1, of)


def walked_moments(
    layer: Layer, sums: dict[str, Array], sharing: str, weights: dict[str, Weights]
) -> Moments:
    """G, from sums over positions of what the recursion found, by use: see `over_positions`.

    Between different uses of a tied kernel the recursion says nothing, so
    "reduce" sums over the positions of each use alone.
    """

    def of(slot: dict[str, Use], blocks: int) -> Array:
        own = {n: sums[n] for n in slot}
        own |= {n: on_both_sides(x, weights[n].columns) for n, x in own.items() if n in weights}
        summed = total(beside_bias(layer, layer.uses[n], x, 2) for n, x in own.items())
        if sharing_of(layer, sharing) == "reduce":
            rows = weights[layer.name].rows if layer.name in weights else jnp.ones((1, 1))
            row = (layer.first.kernel.factor * rows[0, 0].astype(summed.dtype)) ** 2
            return diagonal_blocks(summed * row if layer.indexed else summed, blocks)
        count = total(_places(use, weights.get(n)) for n, use in slot.items())
        return diagonal_blocks(summed / count, blocks)

    return of_both_sides(layer, 1, of)


def beside_bias(layer: Layer, use: Use, array: Array, axes: int = 1) -> Array:
    """What belongs to the inputs of a flipped use, to which no bias is added, with zeros for it."""
    absent = layer.activation_size - array.shape[-1] if use in layer.flipped else 0
    return jnp.pad(array, [(0, 0)] * (array.ndim - axes) + [(0, absent)] * axes)


def _places(use: Use, weights: Weights | None) -> Any:
    """In how many places an example uses a kernel, in the mean; a number, or `[s, 1, 1]`."""
    return use.form.positions if use.choice is None or weights is None else weights.positions


def entries_of(use: Use) -> Int[np.ndarray, "s t o"]:
    """Where in a use's flat output the pre-activations stand."""
    return use.pre_activations(np.arange(size(use.output)).reshape(use.output.aval.shape))


def over_positions(
    layer: Layer, use: Use, matrix: Float[Array, "D D"], sharing: str, weights: Weights | None
) -> Float[Array, "s o o"]:
    """Sums of the matrix over a use's whole pre-activation.

    For "expand" over equal positions, `sum_t M[s, t, o, s, t, o']`; for "reduce"
    over all pairs of positions. Of a kernel that data chooses, position t counts for each
    as often as examples route it there.
    """
    entries = entries_of(use)
    if use.choice is not None and weights is not None and weights.often is not None:
        own = matrix[entries[0][:, :, None], entries[0][:, None, :]]
        often = weights.often.astype(own.dtype)
        return jnp.einsum("st,top->sop", often, own, precision=precision())
    if entries.shape == (1, 1, len(matrix)) and np.all(np.diff(entries) == 1):
        return matrix[None]
    if sharing_of(layer, sharing) == "reduce":
        rows = jnp.sum(matrix[entries], axis=1)  # `[s, o, D]`
        return jnp.stack([jnp.sum(r[:, e], axis=1) for r, e in zip(rows, entries, strict=True)])
    return jnp.sum(matrix[entries[..., :, None], entries[..., None, :]], axis=1)


def assemble(layer: Layer, activation: Moments, pre_activation: Moments) -> Factors:
    """The layer's factors; those of flipped uses, `G ⊗ Q`, are merged with the others."""
    upright = Factors(activation.upright, pre_activation.upright)
    if activation.flipped is None or pre_activation.flipped is None:
        return upright
    parts = [upright, Factors(pre_activation.flipped, activation.flipped)]
    each = len(layer.slots) > 1 and layer.splits == (1, 1)  # slots are blocks of their own
    traces = [(_trace(q, each), _trace(g, each)) for q, g in parts]
    norm = jnp.sqrt(total(q * g for q, g in traces))
    norm = jnp.where(norm > 0, norm, 1)
    pairs = list(zip(parts, traces, strict=True))
    return Factors(
        total(part.activation * g for part, (_, g) in pairs) / norm,
        total(part.pre_activation * q for part, (q, _) in pairs) / norm,
    )


def sharing_of(layer: Layer, sharing: str) -> str:
    # A row that is added everywhere has a constant for its input: "reduce" is
    # exact. Rows that are looked up keep a diagonal Q with "expand" alone, and
    # of several uses the recursion knows no cross terms.
    if layer.indexed:
        return "reduce" if is_one_row(layer) else "expand"
    if any(use.choice is not None for use in layer.uses.values()):
        return "expand"  # the positions of an expert are not those of an example
    return sharing


def is_one_row(layer: Layer) -> bool:
    return layer.activation_size == 1 == sum(use.form.turns for use in layer.uses.values())


def slots_of(layer: Layer) -> list[dict[str, Use]]:
    """The uses of every slot, by their names."""
    names = iter(layer.uses.items())
    return [dict(next(names) for _ in slot) for slot in layer.slots]


def _slots(layer: Layer, flipped: bool = False) -> list[dict[str, Use]]:
    whole = slots_of(layer)
    return [{n: u for n, u in slot.items() if (u in layer.flipped) == flipped} for slot in whole]


def of_both_sides(layer: Layer, side: int, of: Callable[[dict[str, Use], int], Array]) -> Moments:
    """`of(uses, blocks)` of the factor on one side, Q or G, and on the other for flipped uses."""
    shapes = layer.activation_shape, layer.pre_activation_shape
    parts = [of(slot, layer.splits[side]) for slot in _slots(layer)]
    # Blocks on a diagonal stand beside each other, in one entry of the stack.
    own = [part.reshape(-1, *shapes[side][layer.stack > 1 :]) for part in parts]
    upright = layer.stacked(own).reshape(shapes[side])
    if not layer.flipped:
        return Moments(upright)
    found = [of(slot, layer.splits[1 - side]) if slot else 0 for slot in _slots(layer, True)]
    like = next(x for x in found if not isinstance(x, int))
    flipped = jnp.concatenate([jnp.broadcast_to(x, like.shape) for x in found])
    return Moments(upright, flipped.reshape(shapes[1 - side]))


def _trace(matrix: Float[Array, "*S d d"], each: bool) -> Array:
    traces = jnp.trace(matrix, axis1=-2, axis2=-1)
    return traces[..., None, None] if each else jnp.sum(traces)


def moment(rows: Float[Array, "N s t d"], blocks: int = 1) -> Float[Array, "s*blocks b b"]:
    """`sum_nt r_nst r_nst' / N` of rows, or the blocks on its diagonal."""
    if blocks > 1:
        parts = cut(rows, blocks).swapaxes(2, 3)
        rows = parts.reshape(len(parts), -1, *parts.shape[3:])
    count, groups, positions, width = rows.shape
    if width == 1:
        return jnp.sum(jnp.square(rows), axis=(0, 2))[..., None] / count
    if groups == 1:
        flat = rows.reshape(-1, width)
        return (second_moment(flat) * (positions if positions > 1 else 1))[None]
    return jnp.einsum("nsti,nstj->sij", rows, rows, precision=precision()) / count
