"""Random numbers of an example, drawn so that they compile fast.

The examples of a batch have a key each, and their numbers are the innermost loop. XLA unrolls
one of few turns, on CPUs, with the whole generator in it: ten numbers took three times as long
to compile as sixteen.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from kfgn.base.types import Array

_LEAST = 16


def drawn(draw: Callable[..., Array], key: Array, like: Any) -> Array:
    """`draw(key, shape, dtype)`, as of `jax.random.normal`, with the shape and dtype of `like`."""
    count = math.prod(like.shape)
    return draw(key, (max(count, _LEAST),), like.dtype)[:count].reshape(like.shape)


def drawn_class(key: Array, logits: Array) -> Array:
    """A class for each row of logits, `[..., K]`, with the probabilities `softmax(logits)`."""
    return (logits + drawn(jax.random.gumbel, key, logits)).argmax(axis=-1)
