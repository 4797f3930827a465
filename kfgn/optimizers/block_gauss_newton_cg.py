"""The exact block-diagonal Gauss-Newton direction, by conjugate gradients per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_not_negative
from kfgn.base.linalg import factor_dtype
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Named, PyTree
from kfgn.curvature.forward_pass import curved_product, linearize
from kfgn.model.graph import build_graph
from kfgn.objective.objective import Objective, check_batch
from kfgn.optimizers.conjugate_gradient import conjugate_gradient


def block_gauss_newton_direction(
    objective: Objective,
    params: PyTree,
    batch: Any,
    gradient: PyTree,
    damping: Any = 0.0,
    *,
    tolerance: Any = 1e-6,
    max_iterations: int = 250,
) -> tuple[PyTree, dict[str, Array]]:
    """`(G_b + (damping + l2) I)^-1 g_b` for the exact Gauss-Newton block of every layer b.

    The direction that Botev et al. compare their approximations with (appendix
    G.2). LayerBlocks are those of `kfgn.gauss_newton(objective).blocks`, cross terms of tied
    uses included; a parameter in no layer is a block of its own.

    Args:
      objective, params, batch: as everywhere.
      gradient: g, a pytree like params.
      damping: added to the blocks, beside the objective's l2.
      tolerance, max_iterations: as in `conjugate_gradient`.

    Returns:
      The direction, a pytree like params, and by block the relative residuals
      that are left, `[slots]`.
    """
    check_not_negative("damping", damping)
    inputs, targets = check_batch(batch)
    graph = build_graph(objective, params, inputs)
    product = _product(linearize(graph, objective, params, inputs, targets, False), inputs)
    leaves, found, residuals = named_leaves(gradient), {}, {}
    blocks = {name: layer.parameters for name, layer in graph.layers.items()}
    blocks |= {name: (name,) for name in graph.reasons}
    for name, parameters in blocks.items():
        layer = graph.layers.get(name)
        own = {p: leaves[p] for p in parameters}
        whole = own[name] if layer is None else layer.to_matrix(own)
        whole = whole.astype(factor_dtype(whole.dtype))
        slots = 1 if layer is None else len(layer.slots)
        solved, left = [], []
        for k in range(slots):
            solution = conjugate_gradient(
                _slot_product(product, layer, name, whole.shape, k, slots, damping + objective.l2),
                whole.reshape(slots, -1)[k],
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
            solved.append(solution.x)
            left.append(solution.residual)
        matrix = jnp.stack(solved).reshape(whole.shape)
        found.update({name: matrix} if layer is None else layer.from_matrix(matrix))
        residuals[name] = jnp.stack(left)
    found = {n: x.astype(leaves[n].dtype) for n, x in found.items()}
    return with_leaves(gradient, found), residuals


def _product(model: Any, inputs: PyTree) -> Callable[[Named], Named]:
    """`v -> J'HJ v` for a direction by parameter name, of the mean loss."""
    push = model.quadratic(inputs, None)[0]  # of every example

    def curve(pushed: Array) -> Array:
        product = jax.vmap(model.loss.gauss_newton_product)
        return product(model.outputs, model.targets, pushed) / model.examples

    return lambda vector: curved_product(push, vector, curve)


def _slot_product(product, layer, name, shape, k: int, slots: int, shift: Any) -> Callable:
    """`v -> (G_b + shift I) v` for the vector of one slot."""

    def multiply(v: Array) -> Array:
        matrix = jnp.zeros((slots, v.size), v.dtype).at[k].set(v).reshape(shape)
        moved = product({name: matrix} if layer is None else layer.from_matrix(matrix))
        result = moved[name] if layer is None else layer.to_matrix(moved)
        own = result.reshape(slots, -1)[k].astype(v.dtype)
        return own + jnp.asarray(shift).astype(v.dtype) * v

    return multiply
