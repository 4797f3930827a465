"""Kernels chosen by data: `experts[index]`, and the product that each of them meets data in.

Every expert is a group of its own, whose positions are those that are routed to it.
"""

import math
from typing import Any

import numpy as np

from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.layers.parameter_use import Choice, Form, Use
from kfgn.model.layers.readers import looked_up_axis
from kfgn.model.layers.sources import Sources
from kfgn.model.program.dependence import moved, moves_entries
from kfgn.model.program.equations import Equation, Role, is_complex, is_variable, variables


def read_routed(model: FlatModel, gather: Equation, sources: Sources) -> Use | None:
    """The use that begins with rows of a table that are kernels, looked up by data."""
    if gather.primitive.name != "gather" or not variables(gather.invars[:1]):
        return None
    source = sources.get(gather.invars[0])
    found = None if source is None or source.repeats else _looked_up(model, gather)
    if source is None or found is None:
        return None
    axis, own, places = found
    chain, value = [gather], gather.outvars[0]
    while True:
        readers = model.readers.get(value, [])
        if len(readers) != 1 or readers[0] is None:
            return None
        equation: Equation = readers[0]
        chain.append(equation)
        if equation.primitive.name == "dot_general":
            break
        if not moves_entries(equation) or len(equation.outvars) != 1:
            return None
        own, places = moved(equation, own), moved(equation, places)
        value = equation.outvars[0]
    side = equation.invars.index(value)
    data = equation.invars[1 - side]
    if not is_variable(data) or model.roles[data] < Role.PASSIVE or is_complex(data):
        return None
    read = _form(equation, side, axis, own, places, gather.invars[0].aval.shape)
    if read is None:
        return None
    form, at = read
    choice = Choice(gather.invars[1], at)
    return Use(form, source, None, data, equation.outvars[0], tuple(chain), choice=choice)


def _looked_up(model: FlatModel, gather: Equation) -> tuple[int, np.ndarray, np.ndarray] | None:
    """The table's axis, and for each entry of the result where it stood in its row, and which."""
    if not variables(gather.invars[1:]):
        return None
    table, index = gather.invars
    found = looked_up_axis(gather)
    if found is None or model.roles[index] is not Role.PASSIVE:
        return None
    (axis, column), numbers = found, gather.params["dimension_numbers"]
    width = len(numbers.start_index_map)
    rest = [k for k in range(table.aval.ndim) if k != axis]
    shape = gather.outvars[0].aval.shape
    row, count = [table.aval.shape[k] for k in rest], index.aval.size // width
    own, places = np.arange(math.prod(row)), np.arange(count) * width + column
    offset = [n for k, n in enumerate(shape) if k in numbers.offset_dims]
    looked_up = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    inside = np.ones(len(shape), int)
    inside[list(numbers.offset_dims)] = offset
    outside = np.ones(len(shape), int)
    outside[looked_up] = [shape[k] for k in looked_up]
    return (
        axis,
        np.broadcast_to(own.reshape(inside), shape),
        np.broadcast_to(places.reshape(outside), shape),
    )


def _form(
    product: Equation,
    side: int,
    axis: int,
    own: np.ndarray,
    places: np.ndarray,
    table: tuple[int, ...],
) -> tuple[Form, np.ndarray] | None:
    contracted, batch = product.params["dimension_numbers"]
    kernel, data = product.invars[side].aval, product.invars[1 - side].aval
    chosen = [_varies(places, k) for k in range(kernel.ndim)]
    inside = [_varies(own, k) for k in range(kernel.ndim)]
    if any(map(all, zip(chosen, inside, strict=True))):
        return None
    if any(chosen[k] for k in contracted[side]) or any(inside[k] for k in batch[side]):
        return None
    free = [k for k in range(kernel.ndim) if k not in (*contracted[side], *batch[side])]
    open_, outs = [k for k in free if chosen[k]], [k for k in free if not chosen[k]]
    others = [k for k in range(data.ndim) if k not in (*contracted[1 - side], *batch[1 - side])]
    matrices = any(inside[k] for k in contracted[side]) and any(inside[k] for k in outs)
    if not matrices or table[axis] > math.prod(table) // table[axis]:
        return None  # vectors, or a vocabulary of small matrices: an embedding

    def lengths(of: Any, axes: Any) -> tuple[int, ...]:
        return tuple(of.shape[k] for k in axes)

    shape = (lengths(data, batch[1 - side]), lengths(kernel, open_), lengths(data, others))
    positions, d_in = math.prod(sum(shape, ())), math.prod(lengths(kernel, contracted[side]))
    d_out, experts = math.prod(lengths(kernel, outs)), table[axis]
    order = (*batch[side], *open_, *contracted[side], *outs)
    sizes = (math.prod(shape[0]) * math.prod(shape[1]), d_in, d_out)
    within = own.transpose(order).reshape(sizes)[0]
    which = places.transpose(order).reshape(sizes)[:, 0, 0]

    def activations(values: Any) -> Any:
        axes = (*batch[1 - side], *others, *contracted[1 - side])
        moved_ = values.transpose((0, *(1 + k for k in axes)))
        split = moved_.reshape(-1, math.prod(shape[0]), 1, math.prod(shape[2]), d_in)
        return split.repeat(math.prod(shape[1]), 2).reshape(-1, 1, positions, d_in)

    def read_kernel(value: Any) -> Any:
        rows = value.transpose((axis, *(k for k in range(len(table)) if k != axis)))
        return rows.reshape(experts, -1)[:, within.reshape(-1)].reshape(experts, d_in, d_out)

    result = product.outvars[0].aval
    first = free if side == 0 else others
    at = len(batch[0])
    kernel_at = at + (0 if side == 0 else len(first))
    data_at = at + (len(first) if side == 0 else 0)

    def outputs(values: Any) -> Any:
        lead = values.ndim - result.ndim
        axes = (
            *range(at),
            *(kernel_at + free.index(k) for k in open_),
            *range(data_at, data_at + len(others)),
            *(kernel_at + free.index(k) for k in outs),
        )
        found = values.transpose((*range(lead), *(lead + k for k in axes)))
        return found.reshape(*values.shape[:lead], 1, positions, d_out)

    form = Form("dense", experts, positions, d_in, d_out, activations, read_kernel, outputs)
    return form, which.repeat(math.prod(shape[2]))


def _varies(labels: np.ndarray, axis: int) -> bool:
    return labels.shape[axis] > 1 and bool(np.any(np.diff(labels, axis=axis)))
