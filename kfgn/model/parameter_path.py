"""Where the values that layers use come from: one parameter, followed on its way.

A parameter may be reshaped, transposed, cast, sliced, broadcast, or scaled by a
constant before it meets data. All of these move its entries or multiply them by
one number, so that the way can be followed by an array of labels: which entry
of the parameter stands where.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from kfgn.base.types import Array
from kfgn.model.dependence import keeps_order, moved, moves_entries, scaling
from kfgn.model.equations import Equation, Var, bind, variables
from kfgn.model.flat_model import FlatModel
from kfgn.model.primitives import REGISTERED


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
            labels = moved(equation, labels, output)
        return labels

    def follow(self, value: Array) -> Array:
        """The parameter's entries in the layout of the value, uncast and unscaled."""
        for equation, output in self.steps:
            if keeps_order(equation):
                value = value.reshape(equation.outvars[output].aval.shape)
            elif equation.primitive.name in REGISTERED:  # it may have no transpose
                labels = np.arange(value.size).reshape(value.shape)
                value = value.reshape(-1)[moved(equation, labels, output)]
            else:
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
        if moves_entries(equation):
            for k, out in enumerate(equation.outvars):
                sources[out] = _step(source, equation, k)
        elif (factor := scaling(equation)) is not None:
            scaled = dataclasses.replace(source, factor=source.factor * factor)
            sources[equation.outvars[0]] = scaled
    return sources


def _step(source: Source, equation: Equation, output: int) -> Source:
    if equation.primitive.name in REGISTERED:
        moved(equation, np.zeros(equation.invars[0].aval.shape), output)  # checks it
    before, after = equation.invars[0].aval.size, equation.outvars[output].aval.size
    return dataclasses.replace(
        source,
        steps=(*source.steps, (equation, output)),
        repeats=source.repeats or after > before,
        partial=source.partial or after < before,
    )
