"""Inverses of many symmetric positive definite matrices.

A recursive Cholesky factorisation builds `L^-1` from matrix products, which
run at the speed of matrix products, and calls LAPACK on small leaves only.
On CPU two habits of its threads decide the time (measured on two cores):
a threaded triangular solve of even 64 columns leaves LAPACK's own thread pool
spinning beside XLA's, which cost 1 to 8 ms a call, so triangular inverses are
made of products down to blocks too small to be threaded; and matrices of about
one size share one compiled body, in a loop, one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfgn.linalg import matmul

Array = jax.Array

# Below this size LAPACK factorises; above it products do.
_LEAF = 128
# Triangular blocks up to this width are solved by LAPACK, unthreaded.
_SMALL = 16
# Sizes that differ by less than this are padded to the largest of them.
_SLACK = 8


def spd_inverses(matrices: Sequence[Array], shifts: Sequence[Array]) -> list[Array]:
    """`(A + s I)^-1` of every matrix; NaN where a matrix is not positive definite."""
    result: list[Array | None] = [None] * len(matrices)
    last = None
    for members in _groups(matrices):
        size = max(matrices[i].shape[0] for i in members)
        stack = jnp.stack([_shifted(matrices[i], shifts[i], size) for i in members])
        if last is not None:
            # Nothing but order depends on the previous group.
            stack, _ = jax.lax.optimization_barrier((stack, last))
        last = _inverses(stack)
        for k, i in enumerate(members):
            n = matrices[i].shape[0]
            result[i] = last[k, :n, :n]
    return [x for x in result if x is not None]


def spd_inverse(matrix: Array, shift: Array) -> Array:
    """`(matrix + shift I)^-1`; NaN where it is not positive definite."""
    return spd_inverses([matrix], [shift])[0]


def _groups(matrices: Sequence[Array]) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((-(-matrix.shape[0] // _SLACK), matrix.dtype), []).append(i)
    return list(groups.values())


def _shifted(matrix: Array, shift: Array, size: int) -> Array:
    """`matrix + shift I`, padded to `size` by an identity block, which inverts to itself."""
    n = matrix.shape[0]
    diagonal = jnp.where(jnp.arange(size) < n, jnp.asarray(shift, matrix.dtype), 1)
    return jnp.pad(matrix, ((0, size - n),) * 2) + jnp.diag(diagonal)


def _inverses(stack: Array) -> Array:
    return jax.lax.platform_dependent(stack, cpu=_one_by_one, default=_batched)


def _one_by_one(stack: Array) -> Array:
    if stack.shape[0] == 1:
        return _recursive_inverse(stack[0])[None]
    return jax.lax.map(_recursive_inverse, stack)


def _batched(stack: Array) -> Array:
    """For accelerators, whose libraries factorise batches well."""
    lower = jnp.linalg.cholesky(stack)
    identity = jnp.broadcast_to(jnp.eye(stack.shape[-1], dtype=stack.dtype), stack.shape)
    half = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return matmul(jnp.swapaxes(half, -1, -2), half)


def _recursive_inverse(matrix: Array) -> Array:
    return _gram(_inverse_cholesky(matrix))


def _inverse_cholesky(matrix: Array) -> Array:
    """`L^-1` with `matrix = L L'`, by halves: the second half sees the Schur complement."""
    n = matrix.shape[0]
    if n <= _LEAF:
        return _triangular_inverse(jnp.linalg.cholesky(matrix))
    m = n // 2
    first = _inverse_cholesky(matrix[:m, :m])
    below = matmul(matrix[m:, :m], first.T)
    second = _inverse_cholesky(matrix[m:, m:] - matmul(below, below.T))
    corner = -matmul(second, matmul(below, first))
    return _blocks(first, jnp.zeros((m, n - m), matrix.dtype), corner, second)


def _triangular_inverse(lower: Array) -> Array:
    """`lower^-1` by doubling: all diagonal blocks of a width at once."""
    n = lower.shape[0]
    count = 1
    while count * _SMALL < n:
        count *= 2
    size = count * _SMALL
    # An identity block beyond n inverts to itself.
    beyond = jnp.diag((jnp.arange(size) >= n).astype(lower.dtype))
    padded = jnp.pad(lower, ((0, size - n),) * 2) + beyond
    identity = jnp.broadcast_to(jnp.eye(_SMALL, dtype=lower.dtype), (count, _SMALL, _SMALL))
    inverse = jax.lax.linalg.triangular_solve(
        _diagonal_blocks(padded, _SMALL), identity, left_side=True, lower=True
    )
    while inverse.shape[0] > 1:
        width = inverse.shape[1]
        corner = _diagonal_blocks(padded, 2 * width)[:, width:, :width]
        first, second = inverse[0::2], inverse[1::2]
        corner = -matmul(matmul(second, corner), first)
        inverse = _blocks(first, jnp.zeros_like(corner), corner, second)
    return inverse[0, :n, :n]


def _diagonal_blocks(matrix: Array, width: int) -> Array:
    """The blocks `[count, width, width]` on the diagonal."""
    count = matrix.shape[0] // width
    split = matrix.reshape(count, width, count, width)
    return jnp.stack([split[k, :, k] for k in range(count)])


def _gram(lower: Array) -> Array:
    """`lower' lower` of a lower triangular matrix, skipping products with its zeros."""
    n = lower.shape[0]
    if n <= 4 * _LEAF:
        return matmul(lower.T, lower)
    m = n // 2
    first, corner, second = lower[:m, :m], lower[m:, :m], lower[m:, m:]
    cross = matmul(second.T, corner)
    return _blocks(_gram(first) + matmul(corner.T, corner), cross.T, cross, _gram(second))


def _blocks(a: Array, b: Array, c: Array, d: Array) -> Array:
    rows = functools.partial(jnp.concatenate, axis=-1)
    return jnp.concatenate([rows([a, b]), rows([c, d])], axis=-2)
