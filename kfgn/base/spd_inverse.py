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

# Up to this size LAPACK factorizes (twice the size, augmented); above, products do. Up to 99 its
# own threads would never join in, and steps would take a tenth longer to compile.
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
    given = []
    for matrix, shift in zip(matrices, shifts, strict=True):
        each = jnp.broadcast_to(jnp.asarray(shift, matrix.dtype), matrix.shape[:-2])
        given.append((matrix.reshape(-1, *matrix.shape[-2:]), each.reshape(-1)))
    small = [a.ndim > 2 and a.shape[-1] <= _SMALL for a in matrices]
    large = [pair for pair, few in zip(given, small, strict=True) if not few]
    in_turn, at_once = (functools.partial(_grouped, f) for f in (_by_turns, _by_batched_cholesky))
    found = iter(jax.lax.platform_dependent(large, cpu=in_turn, default=at_once) if large else [])
    inverses = (
        _eliminated(_shifted(*pair)) if few else next(found)
        for pair, few in zip(given, small, strict=True)
    )
    return [x.reshape(a.shape) for x, a in zip(inverses, matrices, strict=True)]


def _shifted(
    stack: Float[Array, "S n n"], shifts: Float[Array, " S"] | Float[Array, "S n"]
) -> Float[Array, "S n n"]:
    """`A + s I` of each, or `A + diag(s)`."""
    diagonals = shifts[:, None] if shifts.ndim == 1 else shifts
    return stack + diagonals[..., None] * jnp.eye(stack.shape[-1], dtype=stack.dtype)


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


def _grouped(
    inverses_of: Callable[[Array], Array], given: list[tuple[Array, Array]]
) -> list[Array]:
    """Inverses of stacks with their shifts, those of about one size as one stack.

    A smaller matrix gets an identity block behind it, which inverts to itself.
    """
    inverses: dict[int, Array] = {}
    for members in _alike([stack for stack, _ in given]):
        size = _even(given[members[0]][0].shape[-1])
        padded, diagonals = [], []
        for stack, shifts in (given[i] for i in members):
            own = stack.shape[-1]
            padded.append(jnp.pad(stack, ((0, 0), *((0, size - own),) * 2)))
            diagonals.append(jnp.where(jnp.arange(size) < own, shifts[:, None], 1))
        found = inverses_of(_shifted(jnp.concatenate(padded), jnp.concatenate(diagonals)))
        start = 0
        for stack, i in ((given[i][0], i) for i in members):
            count, own = len(stack), stack.shape[-1]
            inverses[i] = found[start : start + count, :own, :own]
            start += count
    return [inverses[i] for i in range(len(given))]


def _even(size: int) -> int:
    """The next size whose halves, down to leaves, are of one size, and so compiled once."""
    halvings = max(0, math.ceil(math.log2(size / _LEAF))) if size else 0
    return -(-size // 2**halvings) * 2**halvings


def _alike(stacks: list[Array]) -> list[list[int]]:
    """Indices of stacks of one dtype and about one size, the largest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(stacks)), key=lambda i: (str(stacks[i].dtype), -stacks[i].shape[-1])):
        if groups and _fits(stacks[i], [stacks[k] for k in groups[-1]]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _fits(stack: Array, members: list[Array]) -> bool:
    size = members[0].shape[-1]
    padded = (len(stack) + sum(map(len, members))) * size**3
    own = sum(len(x) * x.shape[-1] ** 3 for x in (stack, *members))
    return (
        stack.dtype == members[0].dtype
        and stack.shape[-1] >= _ALIKE * size
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
