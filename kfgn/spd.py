"""Inverses of symmetric positive definite matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def spd_inverse(matrix: Array, shift: Array) -> Array:
    """`(matrix + shift I)^-1` by a Cholesky factorisation; NaN where it fails."""
    size = matrix.shape[0]
    shifted = matrix + shift * jnp.eye(size, dtype=matrix.dtype)
    lower = jnp.linalg.cholesky(shifted)
    half = jax.scipy.linalg.solve_triangular(
        lower, jnp.eye(size, dtype=matrix.dtype), lower=True
    )
    return jnp.matmul(half.T, half, precision="highest")
