"""Each layer's Hessian by weights and biases.

Equation numbers with a V are those of Veitch, "Second order optimization methods
in Deep Learning". With x_n a layer's input and H_n the Hessian in its
pre-activation, which the recursion (V66)-(V67) brings down (his Algorithm 3),

    weights and weights   (1/N) sum_n  x_n x_n' ⊗ H_n     (V68), (V78)
    weights and biases    (1/N) sum_n  x_n ⊗ H_n          (V69), (V79)
    biases and biases     (1/N) sum_n  H_n                (V70), (V80)

on the row-major vec of the kernel `[d_in, d_out]`; his has the transposed kernel.
Each is contracted as it stands: no `I ⊗ X` is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.checks import check_flag
from kfgn.base.errors import ParameterError
from kfgn.base.trees import named_leaves
from kfgn.curvature.dense import refuse_large
from kfgn.curvature.exact import block_hessian, example_blocks
from kfgn.curvature.per_example import mean_over, prepare
from kfgn.model.graph import Graph, build_graph
from kfgn.model.layer import Layer
from kfgn.objective.objective import Objective, require_batch, require_objective

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]


class ParameterHessian(NamedTuple):
    """A layer's Hessian by weights W (`D_W = d_in d_out`) and biases b (`D_b = d_out`).

    Arrays have a leading `[N]` per example, and one of slots for a kernel that
    stacks those of several layers. A layer without bias has `weight_weight`
    alone, and so has a parameter that belongs to no layer.
    """

    weight_weight: Array  # `[D_W, D_W]`
    weight_bias: Array | None  # `[D_W, D_b]`; its transpose is the block below the diagonal
    bias_bias: Array | None  # `[D_b, D_b]`


class ParameterHessianProducts(NamedTuple):
    """The products of the same blocks with weights `[d_in, d_out]` and biases `[d_out]`."""

    weight_weight: Callable[[Array], Array]  # weights to weights
    weight_bias: Callable[[Array], Array] | None  # biases to weights
    bias_weight: Callable[[Array], Array] | None  # weights to biases
    bias_bias: Callable[[Array], Array] | None  # biases to biases


def parameter_hessian(
    objective: Objective, *, per_example: bool = False, as_matvec: bool = False
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """The exact Hessian of the loss in each layer's weights and biases, without l2.

    Args:
      objective: the objective.
      per_example: whether to give every example's, with a leading `[N]`, rather
        than their mean.
      as_matvec: whether to give `ParameterHessianProducts`, which form no matrix,
        rather than a `ParameterHessian`.

    Returns:
      `(params, batch) -> {layer: blocks}`.

    Raises:
      OptionError: an option has a wrong value, or a block would hold over 2 GiB.
    """
    require_objective(objective)
    check_flag("per_example", per_example)
    check_flag("as_matvec", as_matvec)

    def dense(params, batch):
        prepared = prepare(objective, params, batch, hessian=True)
        graph, count = prepared.graph, jax.tree.leaves(prepared.arguments)[0].shape[0]
        refuse_large_blocks(graph, params, prepared.dtype, count if per_example else 1)
        blocks = example_blocks(prepared, params)
        if per_example:
            found = jax.lax.map(blocks, prepared.arguments)
        else:
            found = mean_over(blocks, prepared.arguments, 1)
        return {name: _split(block, graph.layers.get(name)) for name, block in found.items()}

    def matvecs(params, batch):
        inputs, _, _ = require_batch(objective, params, batch)
        graph, leaves = build_graph(objective, params, inputs), named_leaves(params)
        if per_example:
            found = _example_matvecs(objective, graph, params, batch)
        else:
            found = block_hessian(objective, as_matvec=True)(params, batch)
        return {
            name: _products(name, found[name], graph.layers.get(name), leaves) for name in found
        }

    return matvecs if as_matvec else dense


def _split(block: Array, layer: Layer | None) -> ParameterHessian:
    """A block `[..., D, D]` on the vec of `[groups, d_in + 1, d_out]` by weights and biases."""
    if layer is None or layer.first.bias is None:
        return ParameterHessian(block, None, None)
    use = layer.first
    places = np.arange(block.shape[-1]).reshape(use.form.groups, use.width, use.form.d_out)
    w, b = places[:, :-1].reshape(-1), places[:, -1].reshape(-1)
    return ParameterHessian(
        block[..., w[:, None], w], block[..., w[:, None], b], block[..., b[:, None], b]
    )


def _example_matvecs(
    objective: Objective, graph: Graph, params: PyTree, batch: Batch
) -> dict[str, Callable[[Array], Array]]:
    """By block, the product of every example's block with the same matrix, `[N, ...]`."""

    def matvec_of(name):
        def matvec(matrix):
            def one(example):
                alone = jax.tree.map(lambda a: a[None], example)
                return block_hessian(objective, as_matvec=True)(params, alone)[name](matrix)

            return jax.lax.map(one, tuple(batch))

        return matvec

    return {name: matvec_of(name) for name in (*graph.layers, *graph.reasons)}


def _products(
    name: str, matvec: Callable[[Array], Array], layer: Layer | None, leaves: dict[str, Array]
) -> ParameterHessianProducts:
    """A block's product with `[..., d_in + 1, d_out]`, by weights and biases."""
    shape = jnp.shape(leaves[name]) if layer is None else layer.matrix_shape

    def checked(vector, expected):
        if jnp.shape(vector) != expected:
            raise ParameterError(
                f"the block of {name!r} acts on an array of shape {expected}, found shape "
                f"{jnp.shape(vector)}"
            )
        return jnp.asarray(vector)

    if layer is None or layer.first.bias is None:
        return ParameterHessianProducts(lambda w: matvec(checked(w, shape)), None, None, None)
    weights, biases = (*shape[:-2], shape[-2] - 1, shape[-1]), (*shape[:-2], shape[-1])

    def of_weights(w):
        w = checked(w, weights)
        return matvec(jnp.concatenate([w, jnp.zeros((*shape[:-2], 1, shape[-1]), w.dtype)], -2))

    def of_biases(b):
        b = checked(b, biases)[..., None, :]
        return matvec(jnp.concatenate([jnp.zeros(weights, b.dtype), b], -2))

    return ParameterHessianProducts(
        lambda w: of_weights(w)[..., :-1, :],
        lambda b: of_biases(b)[..., :-1, :],
        lambda w: of_weights(w)[..., -1, :],
        lambda b: of_biases(b)[..., -1, :],
    )


def refuse_large_blocks(graph: Graph, params: PyTree, dtype: Any, count: int) -> None:
    """Raises OptionError where `count` dense copies of a block would hold over 2 GiB."""
    leaves = named_leaves(params)
    sizes = {n: (len(x.slots), int(np.prod(x.matrix_shape))) for n, x in graph.layers.items()}
    sizes |= {n: (1, jnp.size(leaves[n])) for n in graph.reasons}
    for name, (slots, entries) in sizes.items():
        side = entries // slots
        remedy = (
            "Pass as_matvec=True to kfgn.curvature.parameter_hessian, or look at "
            'kfgn.diagnostics.negative_curvature of="pre_activation".'
        )
        refuse_large(f"the block of {name!r}", (count * slots, side, side), dtype, remedy)
