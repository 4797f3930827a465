"""Statistics of the batch: what a model computes by collectives over its axis of examples.

With `Objective(model, loss, axis_name="batch")` a model runs on each example under that
axis, as under `jax.vmap(..., axis_name="batch")`, and `jax.lax.pmean(x, "batch")` there is
a mean over the batch. Value and gradient see all of it. Curvature is a sum over examples:
for it the statistics are constants, as the data are: the Jacobian of an example's outputs is
that at fixed statistics. Blocks of layers behind the last statistics are exact. In a classifier
4-6-3 with one normalization, the matrix of `kfgn.gauss_newton` differs from the exact one, that of
the Jacobian of all outputs through the statistics, by 0.29 of its norm with 32 examples and by 0.24
with 256, and its trace in the kernel before the normalization is 7 to 8% larger.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.extend.core as jex

from kfgn.base.errors import ModelError
from kfgn.base.types import PyTree
from kfgn.model.program.equations import (
    Equation,
    axis_names,
    bodies,
    is_differentiated,
    variables,
)

#: An axis of examples: its name, and how many there are.
Axis = tuple[Hashable, int]

# Collectives whose result is the same for every example.
_ALIKE = {
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant",
}  # fmt: skip


def is_alike(equation: Equation) -> bool:
    """Whether a collective gives every example the same."""
    groups = equation.params.get("axis_index_groups")
    return equation.primitive.name in _ALIKE and groups is None


def trace(model: Callable, axis: Axis | None, *args: PyTree) -> tuple[jex.ClosedJaxpr, PyTree]:
    """The jaxpr of a model under its axis of examples, and the shapes of what it returns."""
    env = [axis] if axis else None
    return jax.make_jaxpr(model, axis_env=env, return_shape=True)(*args)


def check_collectives(equations: Iterable[Equation], axis_name: Hashable, roles: Any) -> None:
    """Raises ModelError where statistics are hidden inside of what has to be differentiated."""
    for equation in equations:
        differentiated = any(is_differentiated(roles[v]) for v in variables(equation.invars))
        if axis_name in axis_names(equation) and bodies(equation) and differentiated:
            raise ModelError(
                f"a collective over axis {axis_name!r} is inside of a {equation.primitive.name!r} "
                "that depends on parameters: kfgn holds statistics constant in the curvature, and "
                "finds them outside of branches, unbounded loops and custom derivatives only; "
                "compute them before it."
            )
