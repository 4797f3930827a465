"""A use in the body of a loop as the uses of all its iterations.

What a kernel does in an iteration it does in all of them. Where it is a constant of
the loop, the iterations are further positions of its one use; where it is a slice of
a stack that the loop runs over, they are slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kfgn.model.flatten.loops import Inside, Loop
from kfgn.model.layers.parameter_use import Bias, Form, Use
from kfgn.model.layers.sources import Each, Source


def of_all_iterations(use: Use, loop: Loop, late: int = 0) -> Use | None:
    """The uses in all iterations as one, but for the last `late`, whose results go nowhere.

    None where the slices that the loop takes of a parameter are no slots.
    """
    if loop.once:
        return dataclasses.replace(
            use, input=_inside(loop, use.input, ()), output=_inside(loop, use.output, ())
        )
    turns = np.sort(np.array(loop.order[: loop.length - late], np.int64))
    if not len(turns):
        return None
    form, (kernel, stacked) = use.form, use.kernel.of_rows(loop.equation)
    bias, slots = use.bias, 1
    if stacked:
        if not _are_slots(kernel, turns):
            return None
        slots = len(turns)
    if bias is not None:
        rows, alike = bias.source.of_rows(loop.equation)
        bias = _stacked_bias(bias, rows, turns) if alike else Bias(rows, bias.order)
        if alike is not stacked or bias is None:
            return None
    count, whole = len(turns), np.array_equal(turns, np.arange(loop.length))

    def merged(found: Any) -> Any:
        """`[..., T, s, t, o]` with its first axis among the groups, or the positions."""
        lead, (s, t, o) = found.shape[:-4], found.shape[-3:]
        found = found if whole else found[..., turns, :, :, :]
        if stacked:
            return found.reshape(*lead, count * s, t, o)
        return found.swapaxes(-4, -3).reshape(*lead, s, count * t, o)

    def activations(values: Any) -> Any:
        found = form.activations(values.reshape(-1, *values.shape[2:]))
        found = found[..., None] if form.indexed else found
        found = merged(found.reshape(*values.shape[:2], *found.shape[1:]))
        return found[..., 0] if form.indexed else found

    def read_kernel(value: Any) -> Any:
        if not stacked:
            return form.kernel(value)
        found = _over_rows(form.kernel, value)[turns]
        return found.reshape(-1, *found.shape[2:])

    lifted = Form(
        form.kind,
        form.groups * slots,
        form.positions * (count // slots),
        form.d_in,
        form.d_out,
        activations,
        read_kernel,
        lambda values: merged(use.pre_activations(values)),
        form.indexed,
        form.additive,
        slots=form.slots * slots,
        turns=form.turns * count,
    )
    output = _inside(loop, use.output, (loop.length,))
    return dataclasses.replace(
        use,
        form=lifted,
        kernel=kernel,
        bias=bias,
        input=_inside(loop, use.input, (loop.length,)),
        output=output,
        product_shape=output.aval.shape,
        order=None,
    )


def _inside(loop: Loop, v: Any, lead: tuple[int, ...]) -> Any:
    if v is None:
        return None
    return Inside(loop, v, jax.ShapeDtypeStruct((*lead, *v.aval.shape), v.aval.dtype))


def _are_slots(kernel: Source, turns: np.ndarray) -> bool:
    """Whether the slices of these iterations have nothing in common, and are alike."""
    if isinstance(kernel.steps[0], Each):
        return True  # slices of the parameter itself
    labels = kernel.labels()
    rows = labels.reshape(len(labels), -1)[turns]
    first = np.argsort(rows, axis=1, kind="stable")
    return bool(np.all(first == first[0])) and _have_nothing_in_common(rows)


def _have_nothing_in_common(rows: np.ndarray) -> bool:
    return np.unique(rows).size == sum(np.unique(row).size for row in rows)


def _stacked_bias(bias: Bias, rows: Source, turns: np.ndarray) -> Bias | None:
    """The bias whose entries for each iteration stand where they do in the first slice."""
    labels = rows.labels()
    labels = labels.reshape(len(labels), -1)
    sorter = np.argsort(labels[0])
    places = sorter[np.searchsorted(labels[0], bias.order, sorter=sorter)]
    order = labels[turns][:, places]
    if not _have_nothing_in_common(order):
        return None
    return Bias(rows, order.reshape(-1, order.shape[-1]))


def _over_rows(function: Callable[[Any], Any], values: Any) -> Any:
    """A function of every row, also of numpy's arrays."""
    if isinstance(values, np.ndarray):
        return np.stack([function(row) for row in values])
    return jax.vmap(function)(values)
