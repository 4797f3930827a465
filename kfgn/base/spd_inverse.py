"""Inverses of many symmetric positive definite matrices.

On CPU a recursive Cholesky factorization builds `L^-1` from matrix products,
which run at the speed of matrix products, and calls LAPACK on small leaves
only. A leaf gets its inverse out of the factorization itself (see
`_leaf`): a triangular solve, even of 64 columns, is threaded by
LAPACK's own pool, whose threads then spin beside XLA's and cost 1 to 8 ms a
call (measured on two cores). Matrices of about one size take turns in a loop,
so that the recursion is compiled once for all of them. On accelerators, whose
libraries factorize batches well, they are factorized at once.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.decompositions import cholesky, inverse_of_lower
from kfgn.base.linalg import matmul
from kfgn.base.types import Array

# Up to this size LAPACK factorizes (twice the size, augmented); above, products do.
_LEAF = 128
# Matrices at least this part of the largest in their stack are padded to its size,
# as long as the stack's work, the sum of the cubes, grows by no more than this factor:
# each stack has a recursion of its own to compile, about 0.7 s for one of 1000.
_ALIKE = 0.75
_MORE_WORK = 1.25
# Stacks of matrices up to this size are eliminated, all at once.
_SMALL = 16
# Stands for infinity in an augmented factorization: far above any inverse, and
# its square root far below overflow.
_LARGE = 1e30


def spd_inverses(matrices: Sequence[Array], shifts: Sequence[Array]) -> list[Array]:
    """`(A + s I)^-1` of every matrix; NaN where a matrix is not positive definite.

    A stack of matrices `[S, n, n]` takes a shift for each, `[S]`, with more leading axes likewise.
    """
    shapes = [a.shape for a in matrices]
    shifts = [
        jnp.broadcast_to(jnp.asarray(s, a.dtype), a.shape[:-2]).reshape(-1) if a.ndim > 3
        else jnp.asarray(s, a.dtype)
        for a, s in zip(matrices, shifts, strict=True)
    ]  # fmt: skip
    matrices = [a.reshape(-1, *a.shape[-2:]) if a.ndim > 3 else a for a in matrices]
    given = list(zip(matrices, shifts, strict=True))
    single = [pair for pair in given if pair[0].ndim == 2]
    in_turn, at_once = (functools.partial(_stacked, f) for f in (_by_turns, _by_batched_cholesky))
    found = iter(jax.lax.platform_dependent(single, cpu=in_turn, default=at_once) if single else [])
    inverses = [_inverse_of_stack(a, s) if a.ndim == 3 else next(found) for a, s in given]
    return [a.reshape(shape) for a, shape in zip(inverses, shapes, strict=True)]


def _inverse_of_stack(
    stack: Float[Array, "S n n"], shifts: Float[Array, "*S"]
) -> Float[Array, "S n n"]:
    """Inverses of a stack: many small ones by elimination at once, large ones in turn."""
    stack = _shifted(stack, jnp.broadcast_to(shifts[..., None], stack.shape[:2]))
    if stack.shape[-1] <= _SMALL:
        return _eliminated(stack)
    return jax.lax.platform_dependent(stack, cpu=_by_turns, default=_by_batched_cholesky)


def _shifted(
    matrix: Float[Array, "*S n n"], diagonal: Float[Array, "*S n"]
) -> Float[Array, "*S n n"]:
    """`matrix + diag(diagonal)`."""
    return matrix + diagonal[..., None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)


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


def _stacked(
    inverses_of: Callable[[Array], Array], given: list[tuple[Array, Array]]
) -> list[Array]:
    """Inverses of matrices and their shifts, stacked with those of about the same size.

    A smaller matrix gets an identity block behind it, which inverts to itself.
    """
    inverses: dict[int, Array] = {}
    for members in _alike([matrix for matrix, _ in given]):
        size = _even(len(given[members[0]][0]))
        padded, diagonals = [], []
        for matrix, shift in (given[i] for i in members):
            beyond = size - len(matrix)
            padded.append(jnp.pad(matrix, ((0, beyond),) * 2))
            diagonals.append(jnp.where(jnp.arange(size) < len(matrix), shift, 1))
        found = inverses_of(_shifted(jnp.stack(padded), jnp.stack(diagonals)))
        for k, i in enumerate(members):
            n = len(given[i][0])
            inverses[i] = found[k, :n, :n]
    return [inverses[i] for i in range(len(given))]


def _even(size: int) -> int:
    """The next size whose halves, down to leaves, are of one size, and so compiled once."""
    halvings = max(0, math.ceil(math.log2(size / _LEAF))) if size else 0
    return -(-size // 2**halvings) * 2**halvings


def _alike(matrices: list[Array]) -> list[list[int]]:
    """Indices of matrices of one dtype and about one size, the largest first."""
    groups: list[list[int]] = []
    for i in sorted(
        range(len(matrices)), key=lambda i: (str(matrices[i].dtype), -len(matrices[i]))
    ):
        if groups and _fits(matrices[i], [matrices[k] for k in groups[-1]]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _fits(matrix: Array, members: list[Array]) -> bool:
    size = len(members[0])
    padded = (len(members) + 1) * size**3
    own = len(matrix) ** 3 + sum(len(member) ** 3 for member in members)
    return (
        matrix.dtype == members[0].dtype
        and len(matrix) >= _ALIKE * size
        and padded <= _MORE_WORK * own
    )


def _by_turns(stack: Array) -> Array:
    return _inverse(stack[0])[None] if len(stack) == 1 else jax.lax.map(_inverse, stack)


def _inverse(matrix: Array) -> Array:
    """`L^-T L^-1`, skipping products with zeros where that pays."""
    if matrix.shape[0] <= 4 * _LEAF:
        return _outer(_inverse_transpose(matrix))
    return _outer_of_halves(*_halves(matrix))


def _inverse_transpose(matrix: Array) -> Array:
    """`L^-T` with `matrix = L L'`."""
    n = matrix.shape[0]
    if n <= _LEAF:
        return _leaf(matrix)
    first, corner, second = _halves(matrix)
    return jnp.concatenate(
        [jnp.concatenate([first, corner], axis=1), jnp.pad(second, ((0, 0), (len(first), 0)))]
    )


def _halves(matrix: Array) -> tuple[Array, Array, Array]:
    """`L^-T = [[first, corner], [0, second]]`: the second half sees the Schur complement."""
    m = matrix.shape[0] // 2
    first = _inverse_transpose(matrix[:m, :m])
    below = matmul(-matrix[m:, :m], first)  # negated here, where the slice is copied anyway
    second = _inverse_transpose(matrix[m:, m:] - matmul(below, below.T))
    return first, matmul(first, matmul(below.T, second)), second


def _leaf(matrix: Array) -> Array:
    """`L^-T` from one factorization: `[[A, I], [I, c I]]` has the factor `[[L, 0], [L^-T, .]]`."""
    n = matrix.shape[0]
    below = jnp.eye(2 * n, k=-n, dtype=matrix.dtype)  # only the lower triangle is read
    corner = jnp.diag(jnp.where(jnp.arange(2 * n) < n, 0, _LARGE).astype(matrix.dtype))
    augmented = jnp.pad(matrix, ((0, n), (0, n))) + below + corner
    return cholesky(augmented)[n:, :n]


def _outer(upper: Array) -> Array:
    """`upper upper'` of an upper triangular matrix."""
    n = upper.shape[0]
    if n <= 4 * _LEAF:
        return matmul(upper, upper.T)
    m = n // 2
    return _outer_of_halves(upper[:m, :m], upper[:m, m:], upper[m:, m:])


def _outer_of_halves(first: Array, corner: Array, second: Array) -> Array:
    cross = matmul(corner, second.T)
    top = _outer(first) + matmul(corner, corner.T)
    return jnp.concatenate(
        [jnp.concatenate([top, cross], axis=1), jnp.concatenate([cross.T, _outer(second)], axis=1)]
    )


def _by_batched_cholesky(stack: Array) -> Array:
    half = inverse_of_lower(cholesky(stack))
    return matmul(jnp.swapaxes(half, -1, -2), half)
