"""Matrices of which blocks on the diagonal are kept."""

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.types import Array


def cut(rows: Float[Array, "*N d"], blocks: int) -> Float[Array, "*N blocks b"]:
    """The last axis in so many equal parts, with zeros behind it."""
    width = -(-rows.shape[-1] // blocks)
    beyond = blocks * width - rows.shape[-1]
    padded = jnp.pad(rows, (*[(0, 0)] * (rows.ndim - 1), (0, beyond)))
    return padded.reshape(*rows.shape[:-1], blocks, width)


def on_diagonals(vectors: Float[Array, "s d"], blocks: int) -> Float[Array, "s*blocks b b"]:
    """The blocks of diagonal matrices."""
    parts = cut(vectors, blocks).reshape(vectors.shape[0] * blocks, -1)
    return parts[:, :, None] * jnp.eye(parts.shape[1], dtype=parts.dtype)


def diagonal_blocks(matrices: Float[Array, "s d d"], blocks: int) -> Float[Array, "s*blocks b b"]:
    """The blocks on the diagonals of matrices."""
    if blocks == 1:
        return matrices
    parts = cut(cut(matrices, blocks).transpose(0, 2, 3, 1), blocks)  # `[s, l, b, k, a]`
    found = jnp.einsum("skbka->skab", parts)
    return found.reshape(-1, *found.shape[2:])
