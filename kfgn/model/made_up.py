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
    signs = np.sign(_numbers(value.shape, value.dtype, lambda x: x, 7))
    return (value * (1 + 4 * float(jnp.finfo(value.dtype).eps) * signs)).astype(value.dtype)


def made_up(value: Any, draw: Draw, place: int) -> Any:
    """Made-up numbers for a shape, smaller the more of them are summed; other values stay."""
    if not isinstance(value, Shape):
        return value
    numbers = _numbers(value.shape, value.dtype, draw, place)
    if jnp.issubdtype(value.dtype, jnp.inexact) and len(value.shape) > 1:
        numbers = numbers * min(1.0, 2 / math.sqrt(max(1, math.prod(value.shape[:-1]))))
    return _as_dtype(numbers, value.dtype)


def examples(shape: Shape, draw: Draw, place: int) -> Any:
    """The examples of a batch, and what they are changed into."""
    numbers = _numbers((2 * COUNT, *shape.shape), shape.dtype, draw, -1 - place)
    if numbers.dtype == bool:
        numbers[COUNT:] = ~numbers[:COUNT]
    else:
        numbers[COUNT:] *= 3.0  # a maximum moves, too
    return _as_dtype(numbers, shape.dtype)


def _numbers(shape: tuple[int, ...], dtype: Any, draw: Draw, place: int) -> np.ndarray:
    """Floats from the draw; for integers and others zeros and ones, as booleans."""
    numbers = np.resize(np.roll(_POOL, 211 * place), shape)
    return draw(numbers) if jnp.issubdtype(dtype, jnp.inexact) else numbers > 0


def _as_dtype(numbers: np.ndarray, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return numbers.astype(dtype)
    seeds = numbers.astype(np.uint32).reshape(-1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jnp.zeros((), dtype), seeds)
    return keys.reshape(numbers.shape)
