"""Matrix products of the factors, each at full precision whatever the default is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

PRECISION = jax.lax.Precision.HIGHEST
# What work that is done for many examples at once may hold.
_CHUNK_BYTES = 2**26


def factor_dtype(*dtypes) -> jnp.dtype:
    """The dtype factors live in: at least float32, also under bfloat16 compute."""
    with jax.numpy_dtype_promotion("standard"):  # whatever the user's setting is
        dtype = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    return jax.dtypes.canonicalize_dtype(dtype)  # numpy's float64 means jax's default


def inner(a: Any, b: Any) -> Array:
    """The inner product of two pytrees, accumulated in at least float32.

    Vectors are summed as one: on CPU the sum of each would be compiled to three
    loops of its own, which for all the biases of a model takes longer than the rest.
    """
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    dtype = factor_dtype(*(x.dtype for pair in leaves for x in pair))
    leaves = [(x.astype(dtype), y.astype(dtype)) for x, y in leaves]
    vectors = [(x.ravel(), y.ravel()) for x, y in leaves if x.ndim < 2]
    leaves = [pair for pair in leaves if pair[0].ndim >= 2]
    if vectors:
        xs, ys = zip(*vectors, strict=True)
        leaves.append((jnp.concatenate(xs), jnp.concatenate(ys)))
    return total(jnp.sum(x * y) for x, y in leaves)


def total(arrays: Iterable[Array]) -> Array:
    """The sum of one or more arrays."""
    first, *rest = arrays
    return sum(rest, start=first)


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` at full precision."""
    return jnp.matmul(a, b, precision=PRECISION)


def second_moment(a: Array) -> Array:
    """`a'a / N` of rows `[N, D]`, the mean outer product `[D, D]`."""
    if a.shape[0] == 1:
        return a[0][:, None] * a[0][None, :]
    return matmul(a.T, a) / a.shape[0]


def cross_moment(a: Array, b: Array) -> Array:
    """`a'b / N` of rows `[N, D]` and `[N, E]`."""
    if a is b:
        return second_moment(a)
    if a.shape[0] == 1:
        return a[0][:, None] * b[0][None, :]
    return matmul(a.T, b) / a.shape[0]


def congruence(w: Array, matrix: Array) -> Array:
    """`w matrix w'` of a symmetric matrix."""
    return matmul(matmul(w, matrix), w.T)


def congruence_diagonal(w: Array, matrix: Array) -> Array:
    """The diagonal of `w matrix w'`, without the second product."""
    return jnp.sum(matmul(w, matrix) * w, axis=1)


def sum_over_examples(
    function: Callable[[list[Array]], Array], arguments: list[Array], bytes_each: int
) -> Array:
    """`function(arguments)`, a sum over their leading axis, taken a chunk of examples at a time."""
    count = arguments[0].shape[0]
    chunk = max(1, min(count, _CHUNK_BYTES // max(bytes_each, 1)))
    whole, left = divmod(count, chunk)
    if whole == 1 and not left:
        return function(arguments)
    head = [a[: whole * chunk].reshape(whole, chunk, *a.shape[1:]) for a in arguments]
    shape = jax.eval_shape(function, [a[0] for a in head])
    start = jnp.zeros(shape.shape, shape.dtype)
    result, _ = jax.lax.scan(lambda acc, x: (acc + function(x), None), start, head)
    if left:
        result = result + function([a[whole * chunk :] for a in arguments])
    return result
