"""Models to train, of four architectures, each with data that it can learn.

    model, params, batch, loss = TRAINING["transformer"]()

All in float32, with a batch of 32 and steps of milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfgn

PyTree = Any

COUNT, CLASSES = 32, 3
TOKENS, LENGTH = 8, 4
SIZE = 6

LABELS = kfgn.losses.softmax_cross_entropy_with_integer_labels
PIXELS = kfgn.losses.sigmoid_binary_cross_entropy


class Training(NamedTuple):
    """A model over a batch, its initial parameters, a batch `(inputs, targets)` and the loss."""

    model: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    batch: tuple[jax.Array, jax.Array]
    loss: kfgn.losses.Loss


def _of_module(module: nn.Module, batch: tuple[Any, Any], loss: Any, seed: int) -> Training:
    """What the module has besides parameters stays as it is at the start."""
    inputs, targets = map(jnp.asarray, batch)
    variables = jax.jit(module.init)(jax.random.key(seed), inputs)
    params = {"params": variables.pop("params")}
    return Training(
        lambda p, x: module.apply({**p, **variables}, x), params, (inputs, targets), loss
    )


# A transformer that reads all of a short sequence of tokens.


class Transformer(nn.Module):
    """Embeddings, positions, one block with the norms in front, the mean and the logits."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.normal(0.1)
        h = nn.Embed(TOKENS, self.width, name="embed")(x)
        h = h + self.param("positions", start, (x.shape[1], self.width))
        g = nn.LayerNorm(name="norm_1")(h)
        h = h + nn.MultiHeadDotProductAttention(2, name="attention")(g)
        g = nn.Dense(2 * self.width, name="up")(nn.LayerNorm(name="norm_2")(h))
        h = h + nn.Dense(self.width, name="down")(nn.gelu(g))
        return nn.Dense(CLASSES, name="out")(jnp.mean(nn.LayerNorm(name="norm")(h), axis=1))


def transformer(seed: int = 0) -> Training:
    """Tokens vote for a class, the later ones with more weight."""
    rng = np.random.default_rng([seed, 1])
    tokens = rng.integers(0, TOKENS, (COUNT, LENGTH)).astype(np.int32)
    votes = np.random.default_rng(10).normal(size=(TOKENS, CLASSES))
    votes = (votes - np.mean(votes, axis=0))[tokens]
    labels = np.argmax(np.einsum("ntc,t->nc", votes, np.linspace(0.5, 1.5, LENGTH)), axis=1)
    return _of_module(Transformer(), (tokens, labels.astype(np.int32)), LABELS, seed)


# A residual network on images of stripes.


class ResNet(nn.Module):
    """A convolution, two residual blocks, the second at half the size, the mean and the logits."""

    width: int = 4
    norm: str = "batch"

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(self.width, (3, 3), name="stem")(x)
        for index, stride in enumerate((1, 2)):
            h = self.block(h, self.width * stride, stride, f"block_{index}")
        return nn.Dense(CLASSES, name="out")(jnp.mean(h, axis=(1, 2)))

    def block(self, x, width, stride, name):
        def conv(h, size, stride, part):
            strides = (stride, stride)
            return nn.Conv(width, (size, size), strides, use_bias=False, name=f"{name}_{part}")(h)

        h = nn.relu(self.normalize(conv(x, 3, stride, "conv_1"), f"{name}_norm_1"))
        h = self.normalize(conv(h, 3, 1, "conv_2"), f"{name}_norm_2")
        return nn.relu(h + (x if stride == 1 else conv(x, 1, stride, "shortcut")))

    def normalize(self, x, name):
        if self.norm == "batch":
            return nn.BatchNorm(use_running_average=True, name=name)(x)
        return nn.GroupNorm(num_groups=2, name=name)(x)


def resnet(seed: int = 0, norm: str = "batch") -> Training:
    """The direction of stripes; `norm` is "batch", with frozen statistics, or "group"."""
    rng = np.random.default_rng([seed, 2])
    labels = rng.integers(0, CLASSES, COUNT).astype(np.int32)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    along = np.stack([rows, columns, rows + columns])[labels]
    waves = np.sin(1.5 * along + rng.uniform(0, 2 * np.pi, (COUNT, 1, 1)))
    images = (waves + 0.3 * rng.normal(size=waves.shape))[..., None].astype(np.float32)
    return _of_module(ResNet(norm=norm), (images, labels), LABELS, seed)


# A recurrent network.


class Recurrent(nn.Module):
    """A GRU over time and the logits from its last state."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(nn.GRUCell(self.width, name="cell"))(x)
        return nn.Dense(CLASSES, name="out")(h[:, -1])


def gru(seed: int = 0) -> Training:
    """Which of three signals has the largest sum over time."""
    rng = np.random.default_rng([seed, 3])
    signals = rng.normal(size=(COUNT, LENGTH, CLASSES)).astype(np.float32)
    labels = np.argmax(np.sum(signals, axis=1), axis=1).astype(np.int32)
    return _of_module(Recurrent(), (signals, labels), LABELS, seed)


# A U-Net that finds the pixels of a disc.


class UNet(nn.Module):
    """Two levels, with a skip connection on the upper one; one logit for each pixel."""

    width: int = 4

    @nn.compact
    def __call__(self, x):
        high = nn.silu(nn.Conv(self.width, (3, 3), name="down")(x))
        low = nn.max_pool(high, (2, 2), (2, 2))
        low = nn.silu(nn.Conv(2 * self.width, (3, 3), name="bottom")(low))
        low = nn.ConvTranspose(self.width, (2, 2), (2, 2), name="up")(low)
        h = jnp.concatenate([high, low], axis=-1)
        h = nn.silu(nn.Conv(self.width, (3, 3), name="merge")(h))
        return nn.Conv(1, (1, 1), name="out")(h)


def unet(seed: int = 0) -> Training:
    """Where a disc lies in a noisy image; the target is 1 on its pixels."""
    rng = np.random.default_rng([seed, 4])
    rows, columns = np.mgrid[:SIZE, :SIZE]
    row, column = rng.uniform(2, SIZE - 3, (2, COUNT, 1, 1))
    radius = rng.uniform(1.5, 3, (COUNT, 1, 1))
    disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    images = disc - 0.5 + 0.4 * rng.normal(size=disc.shape)
    pixels = disc[..., None].astype(np.float32)
    return _of_module(UNet(), (images[..., None].astype(np.float32), pixels), PIXELS, seed)


TRAINING: dict[str, Callable[..., Training]] = {
    "transformer": transformer,
    "resnet": resnet,
    "gru": gru,
    "unet": unet,
}
