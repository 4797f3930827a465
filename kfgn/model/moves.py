"""Steps from a parameter to a value of the same entries, moved."""

import dataclasses
import functools
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from kfgn.base.types import Array
from kfgn.model.dependence import keeps_order, moved
from kfgn.model.equations import Equation, bind
from kfgn.model.primitives import REGISTERED


class Move(NamedTuple):
    """An equation that moves entries."""

    equation: Equation
    output: int  # the number of the result

    @property
    def repeats(self) -> bool:
        before, after = self.equation.invars[0], self.equation.outvars[self.output]
        return bool(after.aval.size > before.aval.size)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        return moved(self.equation, labels, self.output)

    def follow(self, value: Array) -> Array:
        equation, output = self
        if keeps_order(equation):
            return value.reshape(equation.outvars[output].aval.shape)
        if equation.primitive.name in REGISTERED:  # it may have no transpose
            return value.reshape(-1)[self.labels(np.arange(value.size).reshape(value.shape))]
        result: Array = bind(equation, [value])[output]
        return result


@dataclasses.dataclass(frozen=True)
class Each:
    """Steps that are taken with every row."""

    steps: "tuple[Step, ...]"

    @property
    def repeats(self) -> bool:
        return any(step.repeats for step in self.steps)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        return np.stack([labels_after(self.steps, row) for row in labels])

    def follow(self, value: Array) -> Array:
        return jax.vmap(functools.partial(followed, self.steps))(value)


Step: TypeAlias = Move | Each


def labels_after(steps: tuple[Step, ...], labels: np.ndarray) -> np.ndarray:
    for step in steps:
        labels = step.labels(labels)
    return labels


def followed(steps: tuple[Step, ...], value: Array) -> Array:
    for step in steps:
        value = step.follow(value)
    return value
