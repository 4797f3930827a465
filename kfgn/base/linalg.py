"""Matrix products of the factors, each at full precision whatever JAX's default is, or as asked."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.devices import vary_shapes, varying_axes
from kfgn.base.trees import first_of
from kfgn.base.types import Array, PyTree, Scalar

_precision = ContextVar("precision", default=jax.lax.Precision.HIGHEST)
PRECISIONS = ("default", "high", "highest")
# What work that is done for many examples at once may hold.
_CHUNK_BYTES = 2**26


@contextmanager
def products_at(precision: str) -> Iterator[None]:
    """Traces products of factors at a precision: of accelerators, TF32 or bfloat16 passes."""
    token = _precision.set(jax.lax.Precision(precision))
    try:
        yield
    finally:
        _precision.reset(token)


def precision() -> jax.lax.Precision:
    """Of the products of factors that are traced now."""
    return _precision.get()


def factor_dtype(*dtypes: Any) -> jnp.dtype:
    """The dtype factors live in: at least float32, also under bfloat16 compute."""
    with jax.numpy_dtype_promotion("standard"):  # whatever the user's setting is
        dtype = functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))
    return jax.dtypes.canonicalize_dtype(dtype)  # numpy's float64 means jax's default


def inner(a: PyTree, b: PyTree) -> Scalar:
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


def matmul(a: Float[Array, "*S i j"], b: Float[Array, "*S j k"]) -> Float[Array, "*S i k"]:
    """`a @ b` at the factors' precision."""
    return jnp.matmul(a, b, precision=precision())


def weighed(weights: Float[Array, " N"] | None, x: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
    """Every example's part of x times its weight, if there are weights."""
    if weights is None:
        return x
    return weights.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) * x


def _gram(a: Float[Array, "N D"], b: Float[Array, "N E"]) -> Float[Array, "D E"]:
    """`a'b`, without a transposed copy."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=precision())


def row_products(a: Float[Array, "N s t i"], b: Float[Array, "N s t o"]) -> Float[Array, "s i o"]:
    """`sum_nt a_nst b_nst'`."""
    if a.shape[1] == 1:
        return _gram(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))[None]
    return jnp.einsum("nsti,nsto->sio", a, b, precision=precision())


def second_moment(a: Float[Array, "N D"]) -> Float[Array, "D D"]:
    """`a'a / N`, the mean outer product of rows."""
    return cross_moment(a, a)


def cross_moment(a: Float[Array, "N D"], b: Float[Array, "N E"]) -> Float[Array, "D E"]:
    """`a'b / N`, the mean outer product of rows of both."""
    if a.shape[0] == 1:
        return a[0][:, None] * b[0][None, :]
    return _gram(a, b) / a.shape[0]


def congruence(w: Float[Array, "E D"], matrix: Float[Array, "D D"]) -> Float[Array, "E E"]:
    """`w matrix w'` of a symmetric matrix."""
    return matmul(matmul(w, matrix), w.T)


def congruence_diagonal(w: Float[Array, "E D"], matrix: Float[Array, "D D"]) -> Float[Array, " E"]:
    """The diagonal of `w matrix w'`, without the second product."""
    return jnp.sum(matmul(w, matrix) * w, axis=1)


def sum_over_examples(
    function: Callable[[Any], Any],
    arguments: PyTree,
    bytes_each: int = 0,
    *,
    chunk_size: int | None = None,
) -> Any:
    """`function(arguments)`, a sum over their leading axis, taken a chunk of examples at a time.

    Args:
      function: of a pytree of arrays `[n, ...]`, for any n; a sum over n, as a pytree.
      arguments: the pytree of all examples, `[N, ...]`.
      bytes_each: what the work on one example holds; chunks stay below 64 MiB.
      chunk_size: instead, the number of examples in a chunk.
    """
    count = count_of(arguments)
    chunk = chunk_size or _even(count, _CHUNK_BYTES // max(bytes_each, 1))
    chunk = max(1, min(count, chunk))
    whole, left = divmod(count, chunk)
    if whole == 1 and not left:
        return function(arguments)
    head = jax.tree.map(lambda a: a[: whole * chunk].reshape(whole, chunk, *a.shape[1:]), arguments)
    function = jax.jit(function)  # traced once, for its shapes and in the loop
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((chunk, *a.shape[1:]), a.dtype), arguments)
    shapes = jax.eval_shape(
        function, vary_shapes(one, varying_axes(arguments))
    )  # known for no examples, too
    start = jax.tree.map(jnp.zeros_like, shapes)  # varying over devices as the sums do

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    result, _ = jax.lax.scan(add, start, head)
    if left:
        result, _ = add(result, jax.tree.map(lambda a: a[whole * chunk :], arguments))
    return result


def _even(count: int, most: int) -> int:
    """A size of chunks, of so many at most, that leaves nothing if one of at least half does."""
    most = max(1, min(count, most))
    return next((n for n in range(most, most // 2, -1) if count % n == 0), most)


def sum_of_examples(
    function: Callable[[Any], Any], arguments: Any, chunk_size: int | None = 1
) -> Any:
    """The sum of a function of one example, worked on so many at once; None for all at once."""
    count = count_of(arguments)

    def summed(chunk: Any) -> Any:
        if chunk_size == 1:  # which keeps every product two-dimensional
            return function(first_of(chunk))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(function)(chunk))

    return sum_over_examples(summed, arguments, chunk_size=chunk_size or count)


def mean_of_examples(
    function: Callable[[Any], Any], arguments: Any, chunk_size: int | None = 1
) -> Any:
    """The mean of a function of one example, in chunks as in `sum_of_examples`."""
    count = count_of(arguments)
    return jax.tree.map(lambda x: x / count, sum_of_examples(function, arguments, chunk_size))


def map_examples(function: Callable[[Any], Any], arguments: Any, chunk_size: int | None = 1) -> Any:
    """A function of one example for all of them, `[N, ...]`, in chunks as in `sum_of_examples`."""
    if chunk_size is None:
        return jax.vmap(function)(arguments)
    size = min(chunk_size, count_of(arguments))
    return jax.lax.map(function, arguments, batch_size=None if size == 1 else size)


def count_of(arguments: Any) -> int:
    """The length N of the leading axis of all leaves."""
    return jax.tree.leaves(arguments)[0].shape[0]
