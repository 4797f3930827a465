"""Kronecker factors of a layer's block, also where a kernel is shared over positions.

With `h_t = a_t W + b` at T positions per example, the block of the mean loss is
`E[sum_tu (a_t a_u') ⊗ (g_t g_u')]`. Two approximations make one Kronecker
product of it (Eschenhagen et al. 2023, section 3):

    expand:  Q = E[sum_t a_t a_t'],        G = E[sum_t g_t g_t'] / T;
    reduce:  Q = E[(sum_t a_t)(sum_t a_t)'] / T^2,   G = E[(sum_t g_t)(sum_t g_t)'].

Both are the same, and the paper's eqs. (21) and (25), where T is 1. The uses
of a tied kernel count as further positions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kfgn.base.checks import check_choice
from kfgn.base.linalg import (
    PRECISION,
    map_examples,
    second_moment,
    sum_of_examples,
    sum_over_examples,
    total,
    weighed,
)
from kfgn.base.trees import batch_of, first_of
from kfgn.base.types import Array, PyTree
from kfgn.curvature.forward_pass import Linearized, as_outputs
from kfgn.model.equations import size
from kfgn.model.layer import Layer
from kfgn.model.parameter_use import Use


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


class Diagonal(NamedTuple):
    """The exact diagonal of the Gauss-Newton matrix for a parameter in no layer.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: x * p**2, kfgn.losses.half_squared_error)
    >>> curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr", unassigned="diagonal")
    >>> _, curvature = curvature_fn(jnp.array([3.0]), (jnp.ones((4, 1)), jnp.ones((4, 1))))
    >>> curvature.factors[""].diagonal.tolist()  # (2 p)²
    [36.0]
    """

    diagonal: Float[Array, "*shape"]  # the parameter's own


class Moments(NamedTuple):
    """One kind of factor: of the uses as the layer has them, and of those that are flipped."""

    upright: Float[Array, "*S d d"] | Float[Array, "*S d"]
    flipped: Float[Array, "d d"] | None = None


def check_sharing(sharing: str) -> None:
    """Raises OptionError for an unknown approximation of weight sharing."""
    check_choice("sharing", sharing, ("expand", "reduce"))


def activation_moments(
    layer: Layer,
    values: dict[str, Array],
    sharing: str,
    dtype: Any,
    importance: Float[Array, " N"] | None = None,
) -> Moments:
    """Q, from the data operand `[N, ...]` of every use by its name, weighed by `importance`."""
    if layer.indexed:
        counts = [_counts(layer, slot, values, dtype, importance) for slot in _slots(layer)]
        return Moments(_stacked(layer, counts))
    roots = None if importance is None else jnp.sqrt(importance)

    def of(slot: dict[str, Use]) -> Array:
        if _sharing(layer, sharing) == "reduce":
            count = sum(use.form.positions for use in slot.values())
            pooled = total(_pooled(u, values[n], dtype) for n, u in slot.items())
            return _moment(weighed(roots, pooled / count))
        return total(_in_chunks(use, values[name], dtype, roots) for name, use in slot.items())

    return _of_both(layer, of)


def gradient_moments(
    layer: Layer, gradients: dict[str, Array], sharing: str, dtype: Any
) -> Moments:
    """G, from gradients `[N, ...]` at the pre-activations of every use by its name."""

    def of(slot: dict[str, Use]) -> Array:
        rows = {n: use.pre_activations(gradients[n]).astype(dtype) for n, use in slot.items()}
        if _sharing(layer, sharing) == "reduce":
            if layer.indexed:
                rows = {n: layer.uses[n].kernel.factor * g for n, g in rows.items()}
            return _moment(total(jnp.sum(g, axis=2, keepdims=True) for g in rows.values()))
        return total(_moment(g) for g in rows.values()) / sum(g.shape[2] for g in rows.values())

    return _of_both(layer, of)


def walked_moments(layer: Layer, sums: dict[str, Array], sharing: str) -> Moments:
    """G, from sums over positions of what the recursion found, by use: see `over_positions`.

    Between different uses of a tied kernel the recursion says nothing, so
    "reduce" sums over the positions of each use alone.
    """

    def of(slot: dict[str, Use]) -> Array:
        summed = total(sums[name] for name in slot)
        if _sharing(layer, sharing) == "reduce":
            return summed * layer.first.kernel.factor**2 if layer.indexed else summed
        count = sum(use.form.positions for use in slot.values())
        return summed if count == 1 else summed / count

    return _of_both(layer, of)


def entries_of(use: Use) -> Int[np.ndarray, "s t o"]:
    """Where in a use's flat output the pre-activations stand."""
    return use.pre_activations(np.arange(size(use.output)).reshape(use.output.aval.shape))


def over_positions(
    layer: Layer, use: Use, matrix: Float[Array, "D D"], sharing: str
) -> Float[Array, "s o o"]:
    """Sums of the matrix over a use's whole pre-activation.

    For "expand" over equal positions, `sum_t M[s, t, o, s, t, o']`; for "reduce"
    over all pairs of positions.
    """
    entries = entries_of(use)
    if entries.shape == (1, 1, len(matrix)) and np.all(np.diff(entries) == 1):
        return matrix[None]
    if _sharing(layer, sharing) == "reduce":
        rows = jnp.sum(matrix[entries], axis=1)  # `[s, o, D]`
        return jnp.stack([jnp.sum(r[:, e], axis=1) for r, e in zip(rows, entries, strict=True)])
    return jnp.sum(matrix[entries[..., :, None], entries[..., None, :]], axis=1)


def assemble(layer: Layer, activation: Moments, pre_activation: Moments) -> Factors:
    """The layer's factors; those of flipped uses, `G ⊗ Q`, are merged with the others.

    A sum of two Kronecker products is none. The merged factors keep its trace,
    and are exact where the two products share either factor up to scale.
    """
    upright = Factors(activation.upright, pre_activation.upright)
    if activation.flipped is None or pre_activation.flipped is None:
        return upright
    parts = [upright, Factors(pre_activation.flipped, activation.flipped)]
    if parts[0].activation.ndim == 1:
        parts[0] = parts[0]._replace(activation=jnp.diag(parts[0].activation))
    traces = [(jnp.trace(q), jnp.trace(g)) for q, g in parts]
    norm = jnp.sqrt(total(q * g for q, g in traces))
    norm = jnp.where(norm > 0, norm, 1)
    pairs = list(zip(parts, traces, strict=True))
    return Factors(
        total(part.activation * g for part, (_, g) in pairs) / norm,
        total(part.pre_activation * q for part, (q, _) in pairs) / norm,
    )


def diagonal_factors(model: Linearized) -> dict[str, Diagonal]:
    """The exact diagonal of the Gauss-Newton matrix for every parameter in no layer.

    `sum_k E[(J'c_k)^2]` over the columns c_k of the output Hessian's root: each
    example sees a copy of the parameters, whose gradients are so its own.
    """

    def outputs_of(own: dict[str, Array], example: PyTree) -> PyTree:
        inputs, statistics = batch_of(example)
        params = {**model.params, **own}
        return first_of(model.graph.forward(params, inputs, statistics=statistics)[0])

    copies = {
        name: jnp.broadcast_to(model.params[name], (model.examples, *model.params[name].shape))
        for name in model.graph.reasons
    }
    examples = model.inputs, model.statistics
    _, pull = jax.vjp(lambda own: jax.vmap(outputs_of)(own, examples), copies)
    count, column = model.loss.sqrt_columns(model.outputs, model.targets)

    def squares(index: Array) -> dict[str, Diagonal]:
        (gradients,) = pull(as_outputs(column(index), model.outputs))
        return {
            name: Diagonal(jnp.mean(jnp.square(g.astype(model.dtype)), axis=0))
            for name, g in gradients.items()
        }

    return dict(sum_of_examples(squares, jnp.arange(count)))


def _sharing(layer: Layer, sharing: str) -> str:
    # A row that is added everywhere has a constant for its input: "reduce" is
    # exact. Rows that are looked up keep a diagonal Q with "expand" alone, and
    # of several uses the recursion knows no cross terms.
    if layer.indexed:
        return "reduce" if _is_one_row(layer) else "expand"
    return sharing


def _is_one_row(layer: Layer) -> bool:
    return layer.activation_size == 1 == len(layer.uses)


def _slots(layer: Layer, flipped: bool = False) -> list[dict[str, Use]]:
    names = iter(layer.uses.items())
    slots = [dict(next(names) for _ in slot) for slot in layer.slots]
    return [{n: u for n, u in slot.items() if (u in layer.flipped) == flipped} for slot in slots]


def _of_both(layer: Layer, of: Any) -> Moments:
    upright = _stacked(layer, [of(slot) for slot in _slots(layer)])
    if not layer.flipped:
        return Moments(upright)
    return Moments(upright, of(_slots(layer, flipped=True)[0])[0])


def _stacked(layer: Layer, parts: list[Array]) -> Array:
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return whole[0] if layer.stack == 1 else whole


def _moment(rows: Float[Array, "N s t d"]) -> Float[Array, "s d d"]:
    """`sum_nt r_nst r_nst' / N` of rows."""
    count, groups, positions, width = rows.shape
    if groups == 1:
        flat = rows.reshape(-1, width)
        return (second_moment(flat) * (positions if positions > 1 else 1))[None]
    return jnp.einsum("nsti,nstj->sij", rows, rows, precision=PRECISION) / count


def _bytes_each(use: Use, dtype: Any) -> int:
    """What the inputs of a use take for one example: a convolution's patches repeat its data."""
    form = use.form
    return form.groups * form.positions * use.width * jnp.dtype(dtype).itemsize


def _in_chunks(
    use: Use, values: Array, dtype: Any, roots: Float[Array, " N"] | None
) -> Float[Array, "s d d"]:
    """The second moment of a use's inputs, with roots of weights if there are any."""

    def moment(chunk: tuple[Array, Array | None]) -> Array:
        return _moment(weighed(chunk[1], use.activations(chunk[0], dtype)))

    def summed(chunk: tuple[Array, Array | None]) -> Array:
        return moment(chunk) * chunk[0].shape[0]

    if use.form.positions == 1:  # no larger than the data
        return moment((values, roots))
    return sum_over_examples(summed, (values, roots), _bytes_each(use, dtype)) / values.shape[0]


def _pooled(use: Use, values: Array, dtype: Any) -> Float[Array, "N s 1 d"]:
    """A use's inputs summed over its positions."""

    def one(value: Array) -> Array:
        return jnp.sum(use.activations(value[None], dtype)[0], axis=1, keepdims=True)

    return map_examples(one, values, max(1, 2**26 // _bytes_each(use, dtype)))


def _counts(
    layer: Layer,
    slot: dict[str, Use],
    values: dict[str, Array],
    dtype: Any,
    importance: Float[Array, " N"] | None,
) -> Float[Array, "1 d_in"]:
    """How often each row is looked up per example, the diagonal of "expand"'s Q."""
    if _is_one_row(layer):  # "reduce", whose G has the factor in it
        return jnp.ones((1, 1), dtype)
    counts = jnp.zeros(layer.activation_size, dtype)
    for name, use in slot.items():
        found = use.form.activations(values[name])
        weight = jnp.full(found.shape, use.kernel.factor**2 / found.shape[0], dtype)
        counts = counts.at[found.reshape(-1)].add(weighed(importance, weight).reshape(-1))
    return counts[None]
