"""Sources: values whose entries are entries of parameters, moved, or functions of these.

An array of labels says which entry of a parameter each entry depends on, if any; its slope
is the derivative in that entry.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.types import Array, Shape
from kfgn.model.program.dependence import keeps_order, moved
from kfgn.model.program.equations import Equation, Var, bind
from kfgn.model.program.primitives import REGISTERED


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


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A value whose entries are made of entries of parameters; a constant may be added.

    A label counts the entries of all its parameters one after the other. Where
    slopes are not `weighted` they are all `factor`.
    """

    value: Var
    parameters: dict[str, Any]  # by name, the variable
    steps: tuple[Step, ...] = ()  # of one parameter that is only moved
    joined: np.ndarray | None = None  # else the labels, -1 for a constant
    factor: float = 1.0
    weighted: bool = False  # whether slopes differ, or depend on values
    # The loops that take slices of it, and the steps before: what follows is the first slice's.
    loops: tuple[tuple[Equation, int], ...] = ()

    @property
    def name(self) -> str:
        return next(iter(self.parameters))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @functools.cached_property
    def derived(self) -> bool:
        """Whether the value is more than entries of parameters, moved and scaled by a number."""
        return self.weighted or (self.joined is not None and bool(np.any(self.joined < 0)))

    @property
    def shape(self) -> Shape:
        """That of the parameter, or of all of them in one vector."""
        shapes = [v.aval.shape for v in self.parameters.values()]
        return shapes[0] if len(shapes) == 1 else (sum(map(math.prod, shapes)),)

    def labels(self) -> np.ndarray:
        """For every entry of the value, the label of the parameters' entry there."""
        if self.joined is not None:
            return self.joined
        labels = np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.shape)
        return labels_after(self.steps, labels)

    @functools.cached_property
    def repeats(self) -> bool:
        """Whether an entry stands in several places."""
        if self.joined is None:
            return any(step.repeats for step in self.steps)
        found = self.joined[self.joined >= 0]
        return np.unique(found).size < found.size

    def follow(self, leaves: dict[str, Array]) -> Array:
        """The parameters' entries in the layout of the value, uncast and unscaled."""
        if self.joined is not None:
            flat, at = self.flat(leaves), self.joined
            found = flat[np.maximum(at, 0)]
            return found if np.all(at >= 0) else jnp.where(at >= 0, found, 0)
        return followed(self.steps, leaves[self.name])

    def flat(self, leaves: dict[str, Array]) -> Array:
        """The parameters in the order of the labels."""
        parts = [leaves[name].reshape(-1) for name in self.parameters]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    @property
    def is_stack(self) -> bool:
        """Whether it is the slices of the parameter itself, in their order."""
        each = [step for step in self.steps if isinstance(step, Each)]
        return len(self.steps) == len(each) == 1 and all(
            isinstance(step, Move) for step in each[0].steps
        )

    def sliced(self, loop: Equation, rows: Var, row: Var) -> Self:
        """The first of the slices that a loop takes of the value."""
        closed = jax.make_jaxpr(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False))(
            jax.ShapeDtypeStruct(rows.aval.shape, rows.aval.dtype)
        )
        steps = (*self.steps, *(Move(equation, 0) for equation in closed.jaxpr.eqns))
        loops = (*self.loops, (loop, len(self.steps)))
        return dataclasses.replace(self, value=row, steps=steps, loops=loops)

    def of_rows(self, loop: Equation) -> tuple[Self, bool]:
        """The source of all slices, `[T, ...]`, and True; of one where there is but one."""
        if not self.loops or self.loops[-1][0] is not loop:
            return self, False
        start = self.loops[-1][1]
        outside = dataclasses.replace(self, loops=self.loops[:-1])
        each = Each(self.steps[start + 2 :])
        rows = dataclasses.replace(outside, steps=(*self.steps[:start], each))
        if self.repeats and len(labels := rows.labels()) and np.all(labels == labels[0]):
            return outside, False  # the same slice again and again
        return rows, True


Sources = dict[Var, Source]
