"""Readers of kfgn's own layer kinds: which equations read as a product with a kernel, and how.

A reader looks at one equation and the position of its kernel, and returns the
`Form`, or None where the equation is no such product.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.linalg import matmul, precision
from kfgn.base.types import Array
from kfgn.model.layers.parameter_use import ChannelRule, Form
from kfgn.model.layers.sources import Source
from kfgn.model.program.equations import Equation, is_complex
from kfgn.model.program.primitives import row_of

Reader = Callable[[Equation, int, Source], Form | None]


def dense(equation: Equation, side: int, source: Source) -> Form | None:
    """`dot_general`: contracted axes are i, the kernel's own o, the data's own t, shared ones s."""
    kernel, data = equation.invars[side], equation.invars[1 - side]
    if source.repeats or is_complex(data):
        return None
    contracted, batch = equation.params["dimension_numbers"]
    (kernel_in, data_in), (kernel_group, data_group) = (
        (pair[side], pair[1 - side]) for pair in (contracted, batch)
    )
    kernel_free = _others(kernel.aval.ndim, (*kernel_in, *kernel_group))
    data_free = _others(data.aval.ndim, (*data_in, *data_group))
    groups = _entries(kernel, kernel_group)
    positions, d_in, d_out = (
        _entries(data, data_free),
        _entries(kernel, kernel_in),
        _entries(kernel, kernel_free),
    )

    def activations(values: Any) -> Any:
        axes = (0, *(1 + axis for axis in (*data_group, *data_free, *data_in)))
        return values.transpose(axes).reshape(-1, groups, positions, d_in)

    def read_kernel(value: Any) -> Any:
        return value.transpose((*kernel_group, *kernel_in, *kernel_free)).reshape(
            groups, d_in, d_out
        )

    def outputs(values: Any) -> Any:
        lead = values.shape[: values.ndim - equation.outvars[0].aval.ndim]
        if side == 0:
            return values.reshape(*lead, groups, d_out, positions).swapaxes(-1, -2)
        return values.reshape(*lead, groups, positions, d_out)

    def layout(entries: np.ndarray) -> np.ndarray:
        return np.moveaxis(activations(entries[None])[0], 0, 1).reshape(positions, -1)

    def whole(value: Array) -> Array:
        blocks = read_kernel(value)
        return jax.scipy.linalg.block_diag(*blocks) if groups > 1 else blocks[0]

    def matrix(value: Array) -> Float[Array, "D_in D_out"]:
        order = np.argsort(layout(np.arange(data.aval.size).reshape(data.aval.shape))[0])
        return whole(value) if np.all(np.diff(order) == 1) else whole(value)[order]

    def congruence(value: Array, omega: Float[Array, "c_out c_out"]) -> Float[Array, "c c"]:
        kernel = whole(value).astype(omega.dtype)
        return matmul(matmul(kernel, omega), kernel.T)

    def left(value: Array, block: Float[Array, "c_out d"]) -> Float[Array, "c d"]:
        return matmul(whole(value).astype(block.dtype), block)

    return Form(
        *("dense", groups, positions, d_in, d_out, activations, read_kernel, outputs),
        matrix=matrix if groups * positions == 1 else None,
        channels=ChannelRule(layout, congruence, left),
    )


def convolution(equation: Equation, side: int, source: Source) -> Form | None:
    """`conv_general_dilated`: inputs i are the entries of a patch, positions t its places."""
    options = equation.params
    data, kernel = equation.invars
    if side != 1 or source.repeats or options["batch_group_count"] != 1 or is_complex(data):
        return None
    specs = options["dimension_numbers"]
    groups, window = options["feature_group_count"], specs.rhs_spec[2:]
    out_channels, in_channels, *_ = (kernel.aval.shape[axis] for axis in specs.rhs_spec)
    shape = tuple(kernel.aval.shape[axis] for axis in window)
    d_in, d_out = in_channels * math.prod(shape), out_channels // groups
    result = equation.outvars[0].aval
    positions = result.size // out_channels

    def patches(example: Array) -> Float[Array, "s i t"]:
        found = jax.lax.conv_general_dilated_patches(
            example,
            shape,
            options["window_strides"],
            options["padding"],
            lhs_dilation=options["lhs_dilation"],
            rhs_dilation=options["rhs_dilation"],
            dimension_numbers=specs,
            precision=jax.lax.Precision.HIGHEST,
        )
        out = specs.out_spec
        return jnp.transpose(found, (out[1], out[0], *out[2:])).reshape(groups, d_in, positions)

    def activations(values: Any) -> Any:
        return jnp.swapaxes(jax.vmap(patches)(values), -1, -2)

    def read_kernel(value: Any) -> Any:
        split = value.transpose(specs.rhs_spec).reshape(groups, d_out, d_in)
        return split.swapaxes(-1, -2)

    def outputs(values: Any) -> Any:
        lead = values.ndim - result.ndim
        out = specs.out_spec
        axes = (*range(lead), *(lead + axis for axis in (out[1], out[0], *out[2:])))
        split = values.transpose(axes).reshape(*values.shape[:lead], groups, d_out, positions)
        return split.swapaxes(-1, -2)

    axis = specs.lhs_spec[1]
    channels = data.aval.shape[axis] // groups

    def layout(entries: np.ndarray) -> np.ndarray:
        return np.moveaxis(entries, axis, -1).reshape(-1, groups * channels)

    def congruence(value: Array, omega: Float[Array, "c_out c_out"]) -> Float[Array, "c c"]:
        """`sum_k n_k W_k Ω W_k' / T` over the entries k of a patch, n_k of which lie inside."""
        inside = jnp.ones((1, *data.aval.shape), omega.dtype)
        counts = jnp.sum(activations(inside)[0, 0], axis=0).reshape(channels, -1)[0]
        split = read_kernel(value).astype(omega.dtype).reshape(groups, channels, -1, d_out)
        omega = omega.reshape(groups, d_out, groups, d_out)
        moved = jnp.einsum("gcko,gohq->gckhq", split, omega, precision=precision())
        result = jnp.einsum("gckhq,hdkq,k->gchd", moved, split, counts, precision=precision())
        width = groups * channels
        return result.reshape(width, width) / (data.aval.size // width)

    return Form(
        *("conv", groups, positions, d_in, d_out, activations, read_kernel, outputs),
        channels=ChannelRule(layout, congruence),
    )


def embedding(equation: Equation, side: int, source: Source) -> Form | None:
    """`gather` along one axis of a table: a is one-hot, and i the index that is looked up."""
    if side != 0 or source.repeats:
        return None
    found = looked_up_axis(equation)
    if found is None:
        return None
    axis, column = found
    table, indices = equation.invars
    others = _others(table.aval.ndim, (axis,))
    numbers = equation.params["dimension_numbers"]
    d_in, d_out = table.aval.shape[axis], _entries(table, others)
    positions = indices.aval.size // len(numbers.start_index_map)
    result = equation.outvars[0].aval
    looked_up = _others(result.ndim, numbers.offset_dims)

    def activations(values: Any) -> Any:
        found = values.reshape(-1, 1, positions, len(numbers.start_index_map))
        return jnp.clip(found[..., column], 0, d_in - 1)

    def read_kernel(value: Any) -> Any:
        return value.transpose((axis, *others)).reshape(1, d_in, d_out)

    def outputs(values: Any) -> Any:
        lead = values.ndim - result.ndim
        axes = (*range(lead), *(lead + k for k in (*looked_up, *numbers.offset_dims)))
        return values.transpose(axes).reshape(*values.shape[:lead], 1, positions, d_out)

    return Form(
        "embedding", 1, positions, d_in, d_out, activations, read_kernel, outputs, indexed=True
    )


def looked_up_axis(gather: Equation) -> tuple[int, int] | None:
    """The axis along which whole rows are looked up, and its place in each index."""
    table, numbers = gather.invars[0].aval, gather.params["dimension_numbers"]
    slices = gather.params["slice_sizes"]
    cut = [k for k, n in enumerate(table.shape) if slices[k] != n]
    if not cut and len(numbers.collapsed_slice_dims) == 1:
        cut = list(numbers.collapsed_slice_dims)
    if len(cut) != 1 or numbers.operand_batching_dims or cut[0] not in numbers.start_index_map:
        return None
    (axis,) = cut
    if slices[axis] != 1 or any(k != axis for k in numbers.collapsed_slice_dims):
        return None
    return axis, numbers.start_index_map.index(axis)


def scale(equation: Equation, side: int, source: Source) -> Form | None:
    """`mul`: every entry of the parameter is a group of its own, one input to one output."""
    if is_complex(equation.outvars[0]):
        return None
    places = _places(_labels_in_result(equation, side, source))
    if places is None:
        return None
    groups, positions = places.shape

    def activations(values: Any) -> Any:
        whole = jnp.broadcast_to(values, (values.shape[0], *equation.outvars[0].aval.shape))
        return whole.reshape(values.shape[0], -1)[:, places][..., None]

    def read_kernel(value: Any) -> Any:
        return _entries_in_order(source, value)[:, None, None]

    def outputs(values: Any) -> Any:
        return _flat(values, equation)[..., places][..., None]

    def diagonal(value: Array) -> Float[Array, " D"]:
        return jnp.broadcast_to(value, equation.outvars[0].aval.shape).reshape(-1)

    return Form(
        *("scale", groups, positions, 1, 1, activations, read_kernel, outputs), diagonal=diagonal
    )


def shift(equation: Equation, side: int, source: Source) -> Form | None:
    """`add`, `sub` or `concatenate`: a look-up of the parameter's rows, each in its fixed place.

    The last axis of the parameter is o, and the row i.
    """
    if is_complex(equation.outvars[0]):
        return None
    places = _places(_labels_in_result(equation, side, source))
    if places is None:
        return None
    lengths = [n for n in source.shape if n != 1] or [1]
    d_out = lengths[-1] if places.shape[0] % lengths[-1] == 0 else places.shape[0]
    d_in = places.shape[0] // d_out
    repeats = places.shape[1]
    order = places.reshape(d_in, d_out, repeats).swapaxes(1, 2).reshape(-1, d_out)
    rows = np.repeat(np.arange(d_in), repeats)

    def activations(values: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(rows), (values.shape[0], 1, rows.size))

    def read_kernel(value: Any) -> Any:
        return _entries_in_order(source, value).reshape(1, d_in, d_out)

    def outputs(values: Any) -> Any:
        return _flat(values, equation)[..., order][..., None, :, :]

    signs = row_of(equation).signs  # none of a concatenation

    def diagonal(value: Array) -> Float[Array, " D"]:
        return jnp.full(equation.outvars[0].aval.size, signs[1 - side], value.dtype)

    return Form(
        *("shift", 1, rows.size, d_in, d_out, activations, read_kernel, outputs),
        indexed=True,
        additive=True,
        diagonal=diagonal if signs else None,
    )


def _labels_in_result(equation: Equation, side: int, source: Source) -> np.ndarray:
    """For each entry of the result, the parameter's entry that is added or joined; -1 for none."""
    shape = equation.outvars[0].aval.shape
    if equation.primitive.name != "concatenate":
        return np.broadcast_to(source.labels(), shape)
    axis = equation.params["dimension"]
    start = sum(atom.aval.shape[axis] for atom in equation.invars[:side])
    labels = np.full(shape, -1)
    own = np.moveaxis(labels, axis, 0)
    own[start : start + equation.invars[side].aval.shape[axis]] = np.moveaxis(
        source.labels(), axis, 0
    )
    return labels


def _places(labels: np.ndarray) -> np.ndarray | None:
    """For each entry of the parameter, where it stands among the result's entries.

    `[entries, positions]`; None where entries stand in unequally many places.
    """
    flat = labels.reshape(-1)
    found, counts = np.unique(flat[flat >= 0], return_counts=True)
    if np.any(counts != counts[0]):
        return None
    order = np.argsort(flat, kind="stable")[np.sum(flat < 0) :]
    return order.reshape(found.size, counts[0])


def _entries_in_order(source: Source, value: Any) -> Any:
    """The entries of the parameter that are used, in its own order, each once."""
    found, first = np.unique(source.labels().reshape(-1), return_index=True)
    return value.reshape(-1)[first[found >= 0]]


def _flat(values: Any, equation: Equation) -> Any:
    lead = values.ndim - equation.outvars[0].aval.ndim
    return values.reshape(*values.shape[:lead], -1)


def _others(ndim: int, axes: Any) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def _entries(variable: Any, axes: Any) -> int:
    return math.prod(variable.aval.shape[axis] for axis in axes)
