"""The static description of an objective's layers that transformations are built from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.trees import named_leaves
from kfgn.curvature.batch import Curvature, check_unassigned
from kfgn.model.graph import build_graph
from kfgn.model.layer import Layer, require_blocks
from kfgn.objective.objective import Objective, check_batch, check_outputs, is_concrete

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class LayerBlocks:
    """Which parameters form which layer; no arrays, no values."""

    layers: dict[str, Layer]
    unassigned: tuple[str, ...]  # parameters in no layer
    shapes: dict[str, tuple[int, ...]]
    treatment: str = "raise"  # of those in no layer

    def present(self, leaves: dict[str, Any]) -> dict[str, Layer]:
        """The layers all of whose parameters are among the leaves.

        Raises:
          ParameterError: a leaf is unknown or has another shape, or a layer is
            split: some of its parameters are there and some are masked out.
        """
        for name, leaf in leaves.items():
            if name not in self.shapes:
                raise ParameterError(
                    f"parameter {name!r} is unknown to the objective that the optimizer was made "
                    f"for, whose parameters are {', '.join(map(repr, self.shapes))}; make the "
                    "optimizer from these params."
                )
            if jnp.shape(leaf) != self.shapes[name]:
                raise ParameterError(
                    f"parameter {name!r} has shape {jnp.shape(leaf)}, but the optimizer was made "
                    f"for shape {self.shapes[name]}; make it from these params."
                )
        for layer in self.layers.values():
            inside = [name for name in layer.parameters if name in leaves]
            if inside and len(inside) < len(layer.parameters):
                outside = [name for name in layer.parameters if name not in leaves]
                raise ParameterError(
                    f"layer {layer.name!r} is split: {', '.join(map(repr, inside))} is optimized "
                    f"here but {', '.join(map(repr, outside))} is masked out; its block covers "
                    "kernel and bias together, so select whole layers."
                )
        return {n: x for n, x in self.layers.items() if x.parameters[0] in leaves}

    def diagonals(self, leaves: dict[str, Any]) -> list[str]:
        """The parameters among the leaves that are preconditioned by a diagonal."""
        return [n for n in self.unassigned if n in leaves and self.treatment == "diagonal"]


def find_blocks(
    objective: Objective, params: PyTree, batch: Any, *, unassigned: str = "raise"
) -> LayerBlocks:
    """Finds the objective's layers from shapes alone, without computing anything.

    Args:
      objective: the objective.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: `(inputs, targets)`, likewise; values are checked where there are any.
      unassigned: "raise" if a parameter belongs to no layer; "diagonal" to
        precondition it by the exact diagonal of the Gauss-Newton matrix;
        "gradient" to give it damped gradient steps.

    Raises:
      LayerError: a parameter belongs to no layer.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.
    """
    check_unassigned(unassigned)
    inputs, targets = check_batch(batch)
    graph = build_graph(objective, params, inputs)
    if unassigned == "raise":
        require_blocks(graph.reasons)
    outputs = jax.eval_shape(objective.model, _shapes(params), _shapes(inputs))
    check_outputs(objective.loss, outputs, inputs, targets)
    if all(is_concrete(leaf) for leaf in jax.tree.leaves(targets)):
        objective.loss.check_targets(outputs, targets)
    shapes = {name: leaf.shape for name, leaf in named_leaves(params).items()}
    return LayerBlocks(graph.layers, tuple(graph.reasons), shapes, unassigned)


def require_curvature(curvature: Any, blocks: LayerBlocks, leaves: dict[str, Any]) -> Curvature:
    """Returns `curvature`, checked to be one for these layers and these leaves.

    Raises:
      OptionError: no curvature, or something else.
      ParameterError: the curvature of other parameters.
    """
    if curvature is None:
        raise OptionError(
            "optimizer.update needs the curvature of the batch: compute it with "
            "(value, grads), curvature = kfgn.value_grad_and_curvature(objective, method)"
            "(params, batch) and pass update(grads, state, params, curvature=curvature)."
        )
    if not isinstance(curvature, Curvature):
        raise OptionError(
            f"curvature must be a kfgn.Curvature, found a {type(curvature).__name__}; pass what "
            "kfgn.value_grad_and_curvature(objective, method)(params, batch) returned."
        )
    wanted = [*blocks.layers, *blocks.diagonals(blocks.shapes)]
    missing = [name for name in wanted if name not in curvature.factors]
    bare = [n for n in missing if n in blocks.unassigned]
    if bare:
        raise ParameterError(
            f"the curvature has no diagonals for parameter(s) {', '.join(map(repr, bare))}, which "
            'are in no layer: the optimizer was made with unassigned="diagonal"; pass the same to '
            "kfgn.value_grad_and_curvature."
        )
    if missing:
        raise ParameterError(
            f"the curvature has no factors for layer(s) {', '.join(map(repr, missing))}: it was "
            "computed for another objective than the optimizer was made for."
        )
    for name, leaf in leaves.items():
        found = jnp.shape(curvature.gradient[name]) if name in curvature.gradient else None
        if found != jnp.shape(leaf):
            raise ParameterError(
                f"the update has a parameter {name!r} of shape {jnp.shape(leaf)}, for which the "
                f"curvature has {'none' if found is None else f'shape {found}'}: it was computed "
                "at other parameters; compute it at the ones that are updated."
            )
    return curvature


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
