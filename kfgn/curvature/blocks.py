"""Blocks: of a layer or of a parameter in none, whole, or by weights and biases.

With x_n a layer's input and H_n the matrix in its pre-activation, which the recursion
(66)-(67) of Veitch brings down (his Algorithm 3), a block has the parts

    weights and weights   (1/N) sum_n  x_n x_n' ⊗ H_n     (68), (78)
    weights and biases    (1/N) sum_n  x_n ⊗ H_n          (69), (79)
    biases and biases     (1/N) sum_n  H_n                (70), (80)

on the row-major vec of the kernel `[d_in, d_out]`; his has the transposed kernel.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.errors import ParameterError
from kfgn.base.types import Array, Shape
from kfgn.model.graph.graph import Graph
from kfgn.model.graph.unite import United
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use


@dataclasses.dataclass(frozen=True)
class LoneParameter:
    """A parameter in no layer, read as a `Layer` is: its matrix is the array as it stands."""

    name: str
    matrix_shape: Shape
    kernels: ClassVar[int] = 1
    uses: ClassVar[dict[str, Use]] = {}

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    def to_matrix(self, leaves: dict[str, Array]) -> Array:
        return leaves[self.name]

    def from_matrix(self, matrix: Array) -> dict[str, Array]:
        return {self.name: matrix}


@dataclasses.dataclass(frozen=True)
class OwnBlock:
    """A parameter in no layer whose exact block stands for G, `[P, P]`; its matrix is a row."""

    name: str
    shape: Shape

    kernels: ClassVar[int] = 1
    uses: ClassVar[dict[str, Use]] = {}

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def matrix_shape(self) -> Shape:
        return (1, math.prod(self.shape))

    @property
    def activation_shape(self) -> Shape:
        return (1, 1)

    @property
    def pre_activation_shape(self) -> Shape:
        return (math.prod(self.shape),) * 2

    def to_matrix(self, leaves: dict[str, Array]) -> Array:
        return leaves[self.name].reshape(1, -1)

    def in_blocks(self, whole: Array) -> Array:
        return whole

    def from_matrix(self, matrix: Array) -> dict[str, Array]:
        return {self.name: matrix.reshape(self.shape)}


Block: TypeAlias = Layer | LoneParameter | OwnBlock


def blocks_of(graph: Graph | United) -> dict[str, Block]:
    """Every block by its name: the layers, then the parameters in none."""
    shapes = {name: graph.model.parameters[name].aval.shape for name in graph.reasons}
    return {**graph.layers, **{name: LoneParameter(name, s) for name, s in shapes.items()}}


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


def split_block(matrix: Float[Array, "*S D D"], block: Block) -> ParameterBlocks:
    """A matrix on the vec of `[groups, d_in + 1, d_out]` by weights and biases."""
    if not _has_bias(block):
        return ParameterBlocks(matrix, None, None)
    entries = np.arange(matrix.shape[-1]).reshape(-1, *block.matrix_shape[-2:])
    w, b = entries[:, :-1].reshape(-1), entries[:, -1].reshape(-1)
    return ParameterBlocks(
        matrix[..., w[:, None], w], matrix[..., w[:, None], b], matrix[..., b[:, None], b]
    )


def split_matvec(
    matvec: Callable[[Array], Array], block: Block
) -> Callable[..., tuple[Array, Array | None]]:
    """A block's product with weights `[..., d_in, d_out]` and biases `[..., d_out]`, as a pair."""
    shape = block.matrix_shape
    expected: tuple[Any, Any] = (shape, None)
    if _has_bias(block):
        expected = (*shape[:-2], shape[-2] - 1, shape[-1]), (*shape[:-2], shape[-1])

    def product(weights: Array, biases: Array | None = None) -> tuple[Array, Array | None]:
        found = (jnp.shape(weights), None if biases is None else jnp.shape(biases))
        if found != expected:
            raise ParameterError(
                f"the block of {block.name!r} acts on weights and biases of shapes {expected}, "
                f"found {found}"
            )
        if biases is None:
            return matvec(jnp.asarray(weights)), None
        result = matvec(jnp.concatenate([weights, biases[..., None, :]], -2))
        return result[..., :-1, :], result[..., -1, :]

    return product


def _has_bias(block: Block) -> bool:
    return len(block.parameters) > 1
