"""Whether a model's examples meet by more than statistics of the batch."""

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import ModelError
from kfgn.base.types import PyTree
from kfgn.model.flatten.inline import Value, inline
from kfgn.model.flatten.named_axis import trace
from kfgn.model.program.equations import Equation, Role, axis_names, bind, bodies
from kfgn.model.trial.independence import check_independent
from kfgn.objective.objective import Objective


def with_constant_statistics(model: Callable, axis_name: Hashable) -> Callable:
    """The model with some constants in the place of its statistics, on batches of any size.

    It acts on each example alone, if nothing but collectives lets the examples meet.
    """

    def evaluate(equation: Equation, values: Sequence[Any]) -> list[Any]:
        if axis_name not in axis_names(equation) or bodies(equation):
            return bind(equation, values)
        return [jnp.full(v.aval.shape, 0.25, v.aval.dtype) for v in equation.outvars]

    def constant(params: PyTree, inputs: PyTree) -> PyTree:
        closed, out = trace(model, (axis_name, 3), params, inputs)
        leaves = jax.tree.leaves((params, inputs))
        found = inline(closed, [Value(x, Role.CONSTANT) for x in leaves], evaluate)
        return jax.tree.unflatten(jax.tree.structure(out), [v.array for v in found])

    return constant


def check_examples(objective: Objective, params: PyTree, inputs: PyTree) -> None:
    """Raises ModelError if an example's outputs depend on others by more than statistics."""
    if getattr(objective.model, "independent", False):
        return

    def function(params: PyTree, inputs: PyTree) -> PyTree:
        return objective.run(params, inputs)[0]

    name = objective.axis_name
    if name is not None:
        function = with_constant_statistics(function, name)
    check_independent(objective.model, params, inputs, function, name)


def per_example_axes(
    objective: Objective, params: PyTree, inputs: PyTree, axes: tuple[int | None, ...]
) -> tuple[int | None, ...]:
    """The axes of those leaves that one example tells, of an objective whose examples are checked.

    Raises:
      ModelError: the outputs depend on more than the example.
    """
    if objective.axis_name is None and any(axis is not None for axis in axes):

        def beside(params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
            outputs, aux = objective.run(params, inputs)
            pairs = zip(jax.tree.leaves(aux), axes, strict=True)
            return outputs, [jnp.moveaxis(x, axis, 0) for x, axis in pairs if axis is not None]

        with contextlib.suppress(ModelError):
            check_independent(objective.model, params, inputs, beside)
            return axes
    check_examples(objective, params, inputs)
    return axes if objective.axis_name is not None else (None,) * len(axes)
