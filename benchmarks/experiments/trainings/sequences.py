"""Trainings on sequences: Python's own documentation, a sum over time, rows of images."""

import functools
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import kfgn
from benchmarks.experiments.trainings.images import CLASSES, cross_entropy, digits, supervised
from benchmarks.experiments.trainings.task import Task


@functools.cache
def characters() -> tuple[int, jax.Array]:
    """How many characters there are, and text by their numbers, `[2000, 33]`."""
    found, numbers = np.unique(_text(0), return_inverse=True)
    return len(found), jnp.asarray(numbers.reshape(2000, 33), jnp.int32)


def later_characters() -> jax.Array:
    """The text that follows, of characters that `characters` has, `[at most 2000, 33]`.

    Rows of the first text are left out, such as those of spaces alone.
    """
    found, text = np.unique(_text(0)), _text(1)
    rows = np.isin(text, found).reshape(2000, 33).all(axis=1)
    first = set(map(tuple, _text(0).reshape(2000, 33).tolist()))
    rows &= np.array([tuple(row) not in first for row in text.reshape(2000, 33).tolist()])
    return jnp.asarray(np.searchsorted(found, text).reshape(2000, 33)[rows], jnp.int32)


def _text(part: int) -> np.ndarray:
    """66,000 characters."""
    text = "".join(topics[name] for name in sorted(topics))
    return np.array(list(text[part * 2000 * 33 :][: 2000 * 33]))


@functools.cache
def words(known: int) -> jax.Array:
    """Words by their rank, `[4000, 9]`; those that are not among the most frequent are the last."""
    text = "".join(topics[name] for name in sorted(topics)).lower().split()[: 4000 * 9]
    found, numbers, counts = np.unique(text, return_inverse=True, return_counts=True)
    rank = np.empty(len(found), np.int32)
    rank[np.argsort(-counts)] = np.arange(len(found))
    return jnp.asarray(np.minimum(rank[numbers], known - 1).reshape(4000, 9))


class Transformer(nn.Module):
    """Two causal blocks of width 32 with four heads."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        h = nn.Embed(self.vocabulary, 32)(tokens)
        h = h + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], 32))
        for _ in range(2):
            a, mask = nn.LayerNorm()(h), nn.make_causal_mask(tokens)
            h = h + nn.MultiHeadDotProductAttention(4)(a, mask=mask)
            h = h + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(h))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(h))


def transformer(seed: int) -> Task:
    """The next of 32 characters."""
    vocabulary, text = characters()
    data = text[:, :-1], text[:, 1:]
    return supervised(Transformer(vocabulary), data, seed, cross_entropy, 32)


def adding(seed: int) -> Task:
    """A GRU adds the two of 40 numbers that are marked."""

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            states: Any = nn.RNN(nn.GRUCell(32))(x)
            return nn.Dense(1)(states[:, -1])

    rng = np.random.default_rng(seed)
    numbers, marks = rng.uniform(size=(2000, 40)), np.zeros((2000, 40))
    np.put_along_axis(marks, rng.integers(0, 20, (2000, 1)), 1, axis=1)
    np.put_along_axis(marks, rng.integers(20, 40, (2000, 1)), 1, axis=1)
    inputs = jnp.asarray(np.stack([numbers, marks], axis=-1), jnp.float32)
    sums = jnp.sum(inputs[..., 0] * inputs[..., 1], axis=1, keepdims=True)
    return supervised(Recurrent(), (inputs, sums), seed, kfgn.losses.half_squared_error, 128)


def lstm(seed: int) -> Task:
    """flax's optimized LSTM reads digits row by row."""

    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            states: Any = nn.RNN(nn.OptimizedLSTMCell(32))(x)
            return nn.Dense(CLASSES)(states[:, -1])

    images, labels = digits()
    return supervised(Rows(), (images.reshape(-1, 8, 8), labels), seed, cross_entropy, 128)


def tied(seed: int) -> Task:
    """The next of 512 words after eight, by the embedding that they are looked up in."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(512, 32)
            h = embed(tokens).reshape(len(tokens), -1)
            return embed.attend(nn.Dense(32)(nn.gelu(nn.Dense(128)(h))))

    text = words(512)
    return supervised(Tied(), (text[:, :8], text[:, 8]), seed, cross_entropy, 256)
