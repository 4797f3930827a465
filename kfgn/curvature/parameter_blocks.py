"""A layer's block by weights and biases.

With x_n a layer's input and H_n the matrix in its pre-activation, which the recursion
(66)-(67) of Veitch brings down (his Algorithm 3), a block has the parts

    weights and weights   (1/N) sum_n  x_n x_n' ⊗ H_n     (68), (78)
    weights and biases    (1/N) sum_n  x_n ⊗ H_n          (69), (79)
    biases and biases     (1/N) sum_n  H_n                (70), (80)

on the row-major vec of the kernel `[d_in, d_out]`; his has the transposed kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.checks import check_size
from kfgn.base.errors import ParameterError
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, PyTree
from kfgn.model.graph import Graph
from kfgn.model.layer import Layer


class ParameterBlocks(NamedTuple):
    """A layer's block by weights W (`D_W = d_in d_out`) and biases b (`D_b = d_out`).

    Arrays have a leading `[N]` per example, and one of slots for a kernel that
    stacks those of several layers. A layer without bias has `weight_weight`
    alone, and so has a parameter that belongs to no layer.

    >>> import jax.numpy as jnp, kfgn
    >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    >>> operator = kfgn.hessian(kfgn.Objective(model, kfgn.losses.half_squared_error))
    >>> params, batch = {"w": jnp.eye(3), "b": jnp.ones(3)}, (jnp.ones((4, 3)), jnp.ones((4, 3)))
    >>> parts = operator.blocks(params, batch, split_bias=True)["w"]
    >>> parts.weight_weight.shape, parts.weight_bias.shape, parts.bias_bias.shape
    ((9, 9), (9, 3), (3, 3))
    """

    weight_weight: Float[Array, "*S D_W D_W"]
    weight_bias: Float[Array, "*S D_W D_b"] | None  # its transpose stands below the diagonal
    bias_bias: Float[Array, "*S D_b D_b"] | None


def split_block(block: Float[Array, "*S D D"], layer: Layer | None) -> ParameterBlocks:
    """A block on the vec of `[groups, d_in + 1, d_out]` by weights and biases."""
    if layer is None or layer.first.bias is None:
        return ParameterBlocks(block, None, None)
    use = layer.first
    entries = np.arange(block.shape[-1]).reshape(use.form.groups, use.width, use.form.d_out)
    w, b = entries[:, :-1].reshape(-1), entries[:, -1].reshape(-1)
    return ParameterBlocks(
        block[..., w[:, None], w], block[..., w[:, None], b], block[..., b[:, None], b]
    )


def split_matvec(
    name: str, matvec: Callable[[Array], Array], layer: Layer | None, leaves: dict[str, Array]
) -> Callable[..., tuple[Array, Array | None]]:
    """A block's product with weights `[..., d_in, d_out]` and biases `[..., d_out]`, as a pair."""
    shape = jnp.shape(leaves[name]) if layer is None else layer.matrix_shape
    expected: tuple[Any, Any] = (shape, None)
    if layer is not None and layer.first.bias is not None:
        expected = (*shape[:-2], shape[-2] - 1, shape[-1]), (*shape[:-2], shape[-1])

    def product(weights: Array, biases: Array | None = None) -> tuple[Array, Array | None]:
        found = (jnp.shape(weights), None if biases is None else jnp.shape(biases))
        if found != expected:
            raise ParameterError(
                f"the block of {name!r} acts on weights and biases of shapes {expected}, found "
                f"{found}"
            )
        if biases is None:
            return matvec(jnp.asarray(weights)), None
        result = matvec(jnp.concatenate([weights, biases[..., None, :]], -2))
        return result[..., :-1, :], result[..., -1, :]

    return product


def refuse_large_blocks(graph: Graph, params: PyTree, dtype: Any, count: int) -> None:
    """Raises OptionError where `count` dense copies of a block would hold over 2 GiB."""
    leaves = named_leaves(params)
    sizes = {n: (len(x.slots), math.prod(x.matrix_shape)) for n, x in graph.layers.items()}
    sizes |= {n: (1, jnp.size(leaves[n])) for n in graph.reasons}
    for name, (slots, entries) in sizes.items():
        side = entries // slots
        remedy = (
            "Use block_matvecs, which form no matrix, or look at "
            'kfgn.diagnostics.negative_curvature of="pre_activation".'
        )
        check_size(f"the block of {name!r}", (count * slots, side, side), dtype, remedy)
