"""Values to try a model on: made up, or those that are given."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.types import PyTree

Shape = jax.ShapeDtypeStruct
Draw = Callable[[np.ndarray], np.ndarray]
Values = tuple[list[Any], list[Any]]  # of parameters, and of examples

COUNT = 3  # examples in a trial, of which there are as many again to change them into
MANY = 7  # examples where noise is drawn: one permutation in 5,040 is the identity

_POOL = np.random.default_rng(0).normal(size=10007)  # a prime: rows of a matrix differ

# Signed values; positive ones, where those leave units dead or are outside of
# a function's domain; small ones, where others overflow.
DRAWS: tuple[Draw, ...] = (
    lambda x: 0.5 * x,
    lambda x: 0.5 * np.abs(x),
    lambda x: 0.05 * np.abs(x) + 0.01,
)


@contextlib.contextmanager
def on_made_up_values() -> Iterator[None]:
    """Made-up values may leave a function's domain, and are put on a device: no bugs of the user's.

    Batches of different sizes are compared to roundoff.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def real_values(params: PyTree, inputs: PyTree) -> Values | None:
    """The parameters and six examples, where they have values that can be looked at."""
    leaves, data = jax.tree.leaves(params), jax.tree.leaves(inputs)
    if not all(isinstance(x, np.ndarray) or _is_here(x) for x in (*leaves, *data)):
        return None
    try:
        rows = np.arange(2 * COUNT)
        return list(map(on_host, leaves)), [on_host(x)[rows % len(x)] for x in data]
    except Exception:  # arrays that are spread over devices may refuse
        return None


def _is_here(leaf: Any) -> bool:
    known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return known and len(leaf.devices()) == 1


def on_host(value: Any) -> Any:
    """As numpy where that costs nothing: a program for each shape would take longer to compile."""
    if not isinstance(value, jax.Array) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value) if all(d.platform == "cpu" for d in value.devices()) else value


def shaken_value(value: Any) -> Any:
    """Floats with an error of some roundoff, other values as they are."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    eps = 4 * float(jnp.finfo(value.dtype).eps)
    return value * _numbers(value.shape, value.dtype, lambda x: 1 + eps * np.sign(x), 7)


def made_up(value: Any, draw: Draw, place: int) -> Any:
    """Made-up numbers for a shape, smaller the more of them are summed; other values stay."""
    if not isinstance(value, Shape):
        return value
    summed = math.prod(value.shape[:-1]) if len(value.shape) > 1 else 1
    scale = min(1.0, 2 / math.sqrt(max(1, summed)))
    return _numbers(value.shape, value.dtype, lambda x: scale * draw(x), place)


def examples(shape: Shape, draw: Draw, place: int) -> Any:
    """The examples of a batch, and what they are changed into."""
    inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
    kind = np.float64 if inexact else np.bool_
    numbers = _numbers((2 * COUNT, *shape.shape), kind, draw, -1 - place)
    if inexact:
        numbers[COUNT:] *= 3.0  # a maximum moves, too
    else:
        numbers[COUNT:] = ~numbers[:COUNT]
    return _as_dtype(numbers, shape.dtype)


def _numbers(shape: tuple[int, ...], dtype: Any, draw: Draw, place: int) -> Any:
    """From the draw, repeated; for integers and others zeros and ones."""
    pool = np.roll(_POOL, 211 * place)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _as_dtype(np.resize(pool > 0, shape), dtype)
    drawn = draw(pool) if jnp.issubdtype(dtype, jnp.inexact) else pool > 0
    return np.resize(drawn.astype(dtype), shape)


def _as_dtype(numbers: np.ndarray, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return numbers.astype(dtype)
    seeds = numbers.astype(np.uint32).reshape(-1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jnp.zeros((), dtype), seeds)
    return keys.reshape(numbers.shape)
