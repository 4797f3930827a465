"""What a model returns beside its outputs, and how it comes back for a batch.

A leaf whose shape follows the batch's size along one axis is per example, and has that axis
of the batch again. Another, such as a new running average, has none where it is the same for
every example: under an axis of examples a collective makes it so. What remains depends on the
whole batch in its own way, a mean accuracy for one; it comes from the model called on the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.types import Array, PyTree
from kfgn.model.flatten.named_axis import Axis, trace
from kfgn.model.program.equations import Equation, Var, abstract


class Aux(NamedTuple):
    """The auxiliary values of a model on one example, beside its outputs."""

    tree: Any
    atoms: tuple[Any, ...]  # variables or literals, by leaf
    axes: tuple[int | None, ...]  # that of the batch, which the atoms lack
    equations: tuple[Equation, ...]  # that nothing else needs

    def of_batch(self, kept: list[Array], varying: set[Var], own: PyTree | None) -> PyTree:
        """The aux of a batch.

        Args:
          kept: the values of the atoms, `[N, ...]`.
          varying: those values that differ from example to example.
          own: the model's aux on the whole batch, for what one example cannot tell; None
            under an axis of examples, where one example tells it all.
        """
        if own is None:
            found = [
                x if atom in varying else x[0] for atom, x in zip(self.atoms, kept, strict=True)
            ]
        else:
            found = jax.tree.leaves(own)
        leaves = [
            one if axis is None else jnp.moveaxis(x, 0, axis)
            for one, axis, x in zip(found, self.axes, kept, strict=True)
        ]
        return jax.tree.unflatten(self.tree, leaves)


def batch_axes(
    run: Callable, axis: Axis | None, params: PyTree, inputs: PyTree
) -> list[int | None]:
    """Along which axis each leaf of aux follows the batch's size, from two sizes of it.

    Args:
      run: `(params, inputs) -> (outputs, aux)`.
      axis: under which it runs.
      params, inputs: arrays or shapes.
    """

    def shapes(count: int) -> list[tuple[int, ...]]:
        batch = jax.tree.map(lambda a: abstract(a, (count, *a.shape[1:])), inputs)
        return [leaf.shape for leaf in jax.tree.leaves(trace(run, axis, params, batch)[1][1])]

    found: list[int | None] = []
    for one, two in zip(shapes(1), shapes(2), strict=True):
        moved = [k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
        follows = len(one) == len(two) and [(one[k], two[k]) for k in moved] == [(1, 2)]
        found.append(moved[0] if follows else None)
    return found
