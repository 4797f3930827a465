"""Where the values that layers use come from: one parameter, followed on its way.

A parameter may be reshaped, transposed, cast, sliced, broadcast, or scaled by a
constant before it meets data. All of these move its entries or multiply them by
one number, so that the way can be followed by an array of labels: which entry
of the parameter stands where.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from kfgn.model.flat_model import Equation, FlatModel, Var, bind, variables

Array = jax.Array

# Operations that keep the row-major order of an array of the same size.
_ORDER_KEEPING = {
    "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type",
    "copy", "copy_p", "reduce_precision", "optimization_barrier", "name", "device_put",
    "sharding_constraint", "layout_constraint", "reshard", "tile",
}  # fmt: skip
# Operations that only move, repeat or drop entries.
_RELABELLING = _ORDER_KEEPING | {"transpose", "rev", "slice", "split", "unstack"}
_CASTS = {"convert_element_type", "reduce_precision"}
# By one number: what it does to the values, and whether it moves their origin.
_SCALING = {"mul", "div", "neg", "add", "sub", "add_any"}


def keeps_order(equation: Equation) -> bool:
    """Whether the equation only reshapes or casts its one operand."""
    atoms = equation.invars
    if len(atoms) != 1 or len(equation.outvars) != 1:
        return False
    if equation.primitive.name == "transpose":
        # Axes of one entry may go anywhere: vmap of `W @ x` leaves such a transpose.
        shape = atoms[0].aval.shape
        long = [axis for axis in equation.params["permutation"] if shape[axis] != 1]
        return long == sorted(long)
    same_size = atoms[0].aval.size == equation.outvars[0].aval.size
    return equation.primitive.name in _ORDER_KEEPING and same_size


def relabels(equation: Equation) -> bool:
    """Whether the equation only moves, repeats or drops the entries of its one operand."""
    return len(variables(equation.invars)) == 1 == len(equation.invars) and (
        equation.primitive.name in _RELABELLING
    )


def relabeled(equation: Equation, labels: np.ndarray, output: int = 0) -> np.ndarray:
    """Labels of the operand's entries, moved as the equation moves the entries."""
    name, options = equation.primitive.name, equation.params
    shape = equation.outvars[output].aval.shape
    if name == "transpose":
        return np.transpose(labels, options["permutation"])
    if name == "rev":
        return np.flip(labels, options["dimensions"])
    if name == "slice":
        strides = options["strides"] or (1,) * labels.ndim
        limits = zip(options["start_indices"], options["limit_indices"], strides, strict=True)
        return labels[tuple(slice(*limit) for limit in limits)]
    if name == "unstack":
        return np.take(labels, output, axis=options["axis"])
    if name == "tile":
        return np.tile(labels, options["reps"])
    if name == "split":
        edges = np.cumsum(options["sizes"])[:-1]
        return np.split(labels, edges, options["axis"])[output]
    if name == "broadcast_in_dim":
        axes = options["broadcast_dimensions"]
        spread = [1] * len(shape)
        for axis, length in zip(axes, labels.shape, strict=True):
            spread[axis] = length
        return np.broadcast_to(labels.reshape(spread), shape)
    return labels.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A parameter, and the steps from it to a value that a layer uses.

    The value is `factor` times the parameter's entries, moved by the steps,
    plus a constant: what is constant has no curvature.
    """

    name: str
    shape: tuple[int, ...]  # of the parameter
    dtype: Any
    steps: tuple[tuple[Equation, int], ...] = ()  # equations, each with its output's number
    factor: float = 1.0
    repeats: bool = False  # whether an entry may stand in several places
    partial: bool = False  # whether entries may be missing

    def labels(self) -> np.ndarray:
        """For every entry of the value, the flat index of the parameter's entry there."""
        labels = np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.shape)
        for equation, output in self.steps:
            labels = relabeled(equation, labels, output)
        return labels

    def follow(self, value: Array) -> Array:
        """The parameter's entries in the layout of the value, uncast and unscaled."""
        for equation, output in self.steps:
            if equation.primitive.name not in _CASTS:
                value = bind(equation, [value])[output]
        return value


def find_sources(model: FlatModel) -> dict[Var, Source]:
    """The values that are made of exactly one parameter in such a way."""
    sources = {v: Source(name, v.aval.shape, v.aval.dtype) for name, v in model.parameters.items()}
    for equation in model.jaxpr.eqns:
        operands = variables(equation.invars)
        if len(operands) != 1 or operands[0] not in sources:
            continue
        source = sources[operands[0]]
        if relabels(equation):
            for k, out in enumerate(equation.outvars):
                sources[out] = _moved(source, equation, k)
        elif (factor := _scaling(equation)) is not None:
            scaled = dataclasses.replace(source, factor=source.factor * factor)
            sources[equation.outvars[0]] = scaled
    return sources


def _moved(source: Source, equation: Equation, output: int) -> Source:
    before, after = equation.invars[0].aval.size, equation.outvars[output].aval.size
    return dataclasses.replace(
        source,
        steps=(*source.steps, (equation, output)),
        repeats=source.repeats or after > before,
        partial=source.partial or after < before,
    )


def _scaling(equation: Equation) -> float | None:
    """The factor of an operation with one number, such as `2 W`, `W / 3` or `1 + W`."""
    name, atoms = equation.primitive.name, equation.invars
    if name not in _SCALING:
        return None
    if name == "neg":
        return -1.0
    position = [isinstance(atom, jex.Literal) for atom in atoms].index(True)
    number: Any = atoms[position].val  # type: ignore[union-attr]
    if np.ndim(number) or (name == "div" and position == 0):
        return None
    if name in ("mul", "div"):
        return float(number) if name == "mul" else 1 / float(number)
    return -1.0 if name == "sub" and position == 0 else 1.0
