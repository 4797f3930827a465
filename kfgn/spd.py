"""Inverses of many symmetric positive definite matrices.

On CPU a recursive Cholesky factorisation builds `L^-1` from matrix products,
which run at the speed of matrix products, and calls LAPACK on small leaves
only. A leaf gets its inverse out of the factorisation itself (see
`_leaf`): a triangular solve, even of 64 columns, is threaded by
LAPACK's own pool, whose threads then spin beside XLA's and cost 1 to 8 ms a
call (measured on two cores). On accelerators, whose libraries factorise
batches well, matrices of about one size are stacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kfgn.linalg import matmul

Array = jax.Array

# Up to this size LAPACK factorises (twice the size, augmented); above, products do.
_LEAF = 128
# Matrices whose sizes are the same up to this are padded to one size.
_ROUND = 8
# Stacks of matrices up to this size are eliminated, all at once.
_SMALL = 16
# Stands for infinity in an augmented factorisation: far above any inverse, and
# its square root far below overflow.
_LARGE = 1e30


def spd_inverses(matrices: Sequence[Array], shifts: Sequence[Array]) -> list[Array]:
    """`(A + s I)^-1` of every matrix; NaN where a matrix is not positive definite.

    A stack of matrices `[S, n, n]` takes a shift for each, `[S]`.
    """
    shifted = [_shifted(a, jnp.asarray(s, a.dtype)) for a, s in zip(matrices, shifts, strict=True)]
    single = [a for a in shifted if a.ndim == 2]
    found = iter(
        jax.lax.platform_dependent(single, cpu=_one_by_one, default=_stacked) if single else []
    )
    return [_inverse_of_stack(a) if a.ndim == 3 else next(found) for a in shifted]


def spd_inverse(matrix: Array, shift: Array | float) -> Array:
    """`(matrix + shift I)^-1`; NaN where it is not positive definite."""
    return spd_inverses([matrix], [jnp.asarray(shift)])[0]


def _shifted(matrix: Array, shift: Array) -> Array:
    n = matrix.shape[-1]
    return matrix + jnp.broadcast_to(shift[..., None, None], matrix.shape) * jnp.eye(
        n, dtype=matrix.dtype
    )


def _inverse_of_stack(stack: Array) -> Array:
    """Inverses of `[S, n, n]`: many small ones by elimination at once, large ones in turn."""
    if stack.shape[-1] <= _SMALL:
        return _eliminated(stack)
    return jax.lax.platform_dependent(
        stack,
        cpu=lambda x: jax.lax.map(lambda a: _outer(_inverse_transpose(a)), x),
        default=_by_batched_cholesky,
    )


def _eliminated(stack: Array) -> Array:
    """Gauss-Jordan elimination, which needs no pivots where a matrix is positive definite."""
    for k in range(stack.shape[-1]):
        pivot = stack[:, k, k]
        pivot = jnp.where(pivot > 0, pivot, jnp.nan)
        row = (stack[:, k] / pivot[:, None]).at[:, k].set(1 / pivot)
        column = stack[:, :, k].at[:, k].set(0)
        rest = stack.at[:, :, k].set(0).at[:, k].set(0)
        stack = (rest - column[:, :, None] * row[:, None, :]).at[:, k].set(row)
    return stack


def _one_by_one(matrices: list[Array]) -> list[Array]:
    return [_outer(_inverse_transpose(matrix)) for matrix in matrices]


def _inverse_transpose(matrix: Array) -> Array:
    """`L^-T` with `matrix = L L'`, by halves: the second half sees the Schur complement."""
    n = matrix.shape[0]
    if n <= _LEAF:
        return _leaf(matrix)
    m = n // 2
    first = _inverse_transpose(matrix[:m, :m])
    below = matmul(matrix[m:, :m], first)
    second = _inverse_transpose(matrix[m:, m:] - matmul(below, below.T))
    corner = matmul(first, matmul(below.T, second))
    return jnp.concatenate(
        [
            jnp.concatenate([first, -corner], axis=1),
            jnp.pad(second, ((0, 0), (m, 0))),
        ]
    )


def _leaf(matrix: Array) -> Array:
    """`L^-T` from one factorisation: `[[A, I], [I, c I]]` has the factor `[[L, 0], [L^-T, .]]`."""
    n = matrix.shape[0]
    below = jnp.eye(2 * n, k=-n, dtype=matrix.dtype)  # only the lower triangle is read
    corner = jnp.diag(jnp.where(jnp.arange(2 * n) < n, 0, _LARGE).astype(matrix.dtype))
    augmented = jnp.pad(matrix, ((0, n), (0, n))) + below + corner
    return jax.lax.linalg.cholesky(augmented, symmetrize_input=False)[n:, :n]


def _outer(upper: Array) -> Array:
    """`upper upper'` of an upper triangular matrix, skipping products with its zeros."""
    n = upper.shape[0]
    if n <= 4 * _LEAF:
        return matmul(upper, upper.T)
    m = n // 2
    first, corner, second = upper[:m, :m], upper[:m, m:], upper[m:, m:]
    cross = matmul(corner, second.T)
    top = _outer(first) + matmul(corner, corner.T)
    return jnp.concatenate(
        [
            jnp.concatenate([top, cross], axis=1),
            jnp.concatenate([cross.T, _outer(second)], axis=1),
        ]
    )


def _stacked(matrices: list[Array]) -> list[Array]:
    groups: dict[tuple, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((-(-matrix.shape[0] // _ROUND), matrix.dtype), []).append(i)
    inverses: dict[int, Array] = {}
    for members in groups.values():
        size = max(matrices[i].shape[0] for i in members)
        stack = jnp.stack([_padded(matrices[i], size) for i in members])
        inverse = _by_batched_cholesky(stack)
        for k, i in enumerate(members):
            n = matrices[i].shape[0]
            inverses[i] = inverse[k, :n, :n]
    return [inverses[i] for i in range(len(matrices))]


def _by_batched_cholesky(stack: Array) -> Array:
    lower = jnp.linalg.cholesky(stack)
    identity = jnp.broadcast_to(jnp.eye(stack.shape[-1], dtype=stack.dtype), stack.shape)
    half = jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
    return matmul(jnp.swapaxes(half, -1, -2), half)


def _padded(matrix: Array, size: int) -> Array:
    """The matrix with an identity block behind it, which inverts to itself."""
    n = matrix.shape[0]
    if n == size:
        return matrix
    beyond = jnp.diag((jnp.arange(size) >= n).astype(matrix.dtype))
    return jnp.pad(matrix, ((0, size - n),) * 2) + beyond
