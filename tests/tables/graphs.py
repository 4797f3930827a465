"""Rows of the table of architectures: branches, pooling, dropout and convolutional networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.tables.rows import (
    KINDS,
    NORM,
    Dense,
    Row,
    affine,
    affine_blocks,
    alone,
    block,
    dense_blocks,
    keys,
    linen,
    mean_positions,
    net,
    normal,
    plain,
    several,
    tokens,
)

Shapes = dict[str, Any]
OUT: Shapes = {"w": (2, 2), "b": (2,)}
TWO: Shapes = {"first": {"w": (3, 2), "b": (2,)}, "out": OUT}


def _affine(d_in: int, d_out: int) -> Shapes:
    return {"w": (d_in, d_out), "b": (d_out,)}


# Branches.


def _residual(p, x):
    h = x + jnp.tanh(affine(p["first"], x))
    h = h + affine(p["third"], jnp.tanh(affine(p["second"], h)))
    return affine(p["out"], h)


def _subtracted(p, x):
    """Products that are subtracted from their biases, one beside a skip connection."""
    h = jnp.tanh(p["first"]["b"] - x @ p["first"]["w"])
    h = jnp.sin(h + (p["second"]["b"] - h @ p["second"]["w"]))
    return affine(p["out"], jnp.tanh(p["scaled"]["b"] - h * p["scaled"]["s"]))


def _densely_connected(p, x):
    h = jnp.concatenate([x, jnp.tanh(affine(p["first"], x))], axis=-1)
    h = jnp.concatenate([h, jnp.tanh(affine(p["second"], h))], axis=-1)
    return affine(p["out"], h)


def _glu(p, x):
    return affine(p["out"], affine(p["value"], x) * jax.nn.sigmoid(affine(p["gate"], x)))


def _swiglu(p, x):
    value, gate = jnp.split(x @ p["first"], 2, axis=-1)
    return affine(p["out"], value * jax.nn.silu(gate))


def _layer_scale(p, x):
    return affine(p["out"], x + p["scale"] * jnp.tanh(affine(p["first"], x)))


def _squeeze_excite(p, x):
    h = jnp.tanh(affine(p["first"], x))
    gate = jax.nn.sigmoid(affine(p["gate"], mean_positions(h)))
    return affine(p["out"], mean_positions(h * gate[:, None]))


def _mixer(p, x):
    h = jnp.swapaxes(affine(p["positions"], jnp.swapaxes(x, 1, 2)), 1, 2)
    h = x + jnp.tanh(h)
    return mean_positions(affine(p["out"], jnp.tanh(affine(p["channels"], h))))


def _siamese(p, inputs):
    left, right = (jnp.tanh(affine(p["first"], x)) for x in inputs)
    return affine(p["out"], (left - right) ** 2)


def _siamese_stacked(p, x):
    h = jnp.tanh(affine(p["first"], x))
    return jnp.sum(h[:, 0] * h[:, 1], axis=-1) + p["shift"]


def _several(p, inputs):
    line = jnp.tanh(affine(p["line"], inputs["line"]))
    sequence = mean_positions(jnp.tanh(affine(p["sequence"], inputs["sequence"])))
    h = line * sequence + p["table"][inputs["token"]]
    return {"classes": affine(p["classes"], h), "value": affine(p["value"], h)[:, 0]}


def _dropout(p, inputs):
    def one(x, key):
        h = jnp.tanh(affine(p["first"], x))
        kept = jax.random.bernoulli(key, 0.75, h.shape)
        return affine(p["out"], jnp.where(kept, h / 0.75, 0))

    return jax.vmap(one)(*inputs)


class _Dropout(nn.Module):
    """Dropout with a key for each example."""

    @nn.compact
    def __call__(self, inputs):
        def one(x, key):
            h = nn.tanh(first(x))
            return nn.Dropout(0.4, deterministic=False, parent=None).apply(
                {}, h, rngs={"dropout": key}
            )

        first = Dense(4, name="first")
        return Dense(2, name="out")(jax.vmap(one)(*inputs))


def _average_pool(p, x):
    h = jax.lax.conv_general_dilated(
        x, p["conv"]["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    h = jnp.tanh(h + p["conv"]["b"])
    sums = jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 3, 1), (1, 1, 1), "SAME")
    return affine(p["out"], mean_positions(jnp.tanh(sums / 3)))


BRANCHES = {
    "residual": Row(
        plain(_residual, {"first": OUT, "second": _affine(2, 3), "third": _affine(3, 2),
                          "out": OUT}),
        normal(2),
        affine_blocks("first", "second", "third", "out"),
    ),
    "subtracted": Row(
        plain(_subtracted, {"first": OUT, "second": _affine(2, 2), "scaled": {"s": (2,), "b": (2,)},
                            "out": OUT}),
        normal(2),
        affine_blocks("first", "second", "out") | block("scaled", "s", "b"),
    ),
    "dense_concatenation": Row(
        plain(_densely_connected, {"first": OUT, "second": _affine(4, 2), "out": _affine(6, 2)}),
        normal(2),
        affine_blocks("first", "second", "out"),
        loss="softmax_cross_entropy",
    ),
    "glu": Row(
        plain(_glu, {"value": _affine(2, 3), "gate": _affine(2, 3), "out": _affine(3, 2)}),
        normal(2),
        affine_blocks("value", "gate", "out"),
    ),
    "swiglu_sequence": Row(
        plain(_swiglu, {"first": (2, 6), "out": _affine(3, 2)}),
        normal(2, 2),
        alone("first") | affine_blocks("out"),
        output="sequence",
    ),
    "layer_scale": Row(
        plain(_layer_scale, {"first": OUT, "scale": (2,), "out": OUT}),
        normal(3, 2),
        affine_blocks("first", "out") | alone("scale"),
        output="sequence",
    ),
    "squeeze_excite": Row(
        plain(_squeeze_excite, {"first": OUT, "gate": OUT, "out": OUT}),
        normal(3, 2),
        affine_blocks("first", "gate", "out"),
        output="pooled",
    ),
    "mixer": Row(
        plain(_mixer, {"positions": _affine(3, 3), "channels": _affine(2, 3),
                       "out": _affine(3, 2)}),
        normal(3, 2),
        affine_blocks("positions", "channels", "out"),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "siamese": Row(
        plain(_siamese, TWO),
        several(normal(3), normal(3)),
        affine_blocks("first", "out"),
        loss="sigmoid_binary_cross_entropy",
    ),
    "siamese_stacked": Row(
        plain(_siamese_stacked, {"first": _affine(3, 2), "shift": ()}),
        normal(2, 3),
        affine_blocks("first") | alone("shift"),
        output="scalar",
        loss="sigmoid_binary_cross_entropy",
    ),
    "several_inputs_and_outputs": Row(
        plain(
            _several,
            {"line": _affine(3, 2), "sequence": OUT, "table": (4, 2), "classes": _affine(2, 3),
             "value": _affine(2, 1)},
        ),
        several(line=normal(3), sequence=normal(2, 2), token=tokens(4)),
        affine_blocks("line", "sequence", "classes", "value") | alone("table"),
        output="tree",
        loss="classes_and_value",
    ),
    "dropout": Row(
        plain(_dropout, TWO), several(normal(3), keys()), affine_blocks("first", "out")
    ),
    "dropout_linen": Row(
        linen(_Dropout()),
        several(normal(3), keys()),
        dense_blocks("params/first", "params/out"),
    ),
    "max_pool": Row(
        net(nn.Conv(2, (2,), **KINDS), lambda x: nn.max_pool(x, (2,), (2,)), jnp.tanh,
            mean_positions, Dense(2)),
        normal(4, 1),
        dense_blocks("params/layers_0", "params/layers_4"),
        output="pooled",
    ),
    "max_pool_overlapping": Row(
        net(nn.Conv(2, (2, 2), **KINDS), lambda x: nn.max_pool(x, (2, 2), (1, 1), "SAME"),
            mean_positions, jnp.tanh, Dense(2)),
        normal(3, 3, 1),
        dense_blocks("params/layers_0", "params/layers_4"),
        output="pooled",
    ),
    "average_pool": Row(
        net(nn.Conv(2, (2, 2), **KINDS), jnp.tanh, lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
            lambda x: x.reshape(len(x), -1), Dense(2)),
        normal(4, 2, 1),
        dense_blocks("params/layers_0", "params/layers_4"),
        loss="softmax_cross_entropy",
        tags=frozenset({"loose"}),
    ),
    "average_pool_overlapping": Row(
        plain(_average_pool, {"conv": {"w": (2, 1, 2), "b": (2,)}, "out": OUT}),
        normal(4, 1),
        affine_blocks("conv", "out"),
        output="pooled",
    ),
}  # fmt: skip

# Convolutional networks.


class _ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=True, name=name, **NORM)

        h = nn.Conv(2, (2, 2), use_bias=False, name="conv_1", **KINDS)(x)
        h = nn.relu(norm("norm_1")(h))
        h = norm("norm_2")(nn.Conv(2, (2, 2), use_bias=False, name="conv_2", **KINDS)(h))
        h = nn.relu(h + nn.Conv(2, (1, 1), use_bias=False, name="shortcut", **KINDS)(x))
        return Dense(2, name="out")(mean_positions(h))


class _UNet(nn.Module):
    """Convolution, pooling, convolution, upsampling, concatenation and convolution."""

    axes: int
    transposed: bool

    @nn.compact
    def __call__(self, x):
        kernel, pool = (2,) * self.axes, (2,) * self.axes
        h = nn.tanh(nn.Conv(2, kernel, name="down", **KINDS)(x))
        low = nn.tanh(nn.Conv(2, kernel, name="low", **KINDS)(nn.max_pool(h, pool, pool)))
        if self.transposed:
            low = nn.ConvTranspose(2, pool, strides=pool, name="up", **KINDS)(low)
        else:
            for axis in range(self.axes):
                low = jnp.repeat(low, 2, axis=axis + 1)
        h = jnp.concatenate([h, low], axis=-1)
        return nn.Conv(1, (1,) * self.axes, name="out", **KINDS)(h)


def _named(*names: str, bias: bool = True) -> dict[str, tuple[str, ...]]:
    return dense_blocks(*(f"params/{name}" for name in names), bias=bias)


CONVOLUTIONAL = {
    "resnet": Row(
        linen(_ResNet()),
        normal(3, 3, 1),
        _named("conv_1", "conv_2", "shortcut", bias=False)
        | block("params/norm_1", "scale", "bias")
        | block("params/norm_2", "scale", "bias")
        | _named("out"),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "unet": Row(
        linen(_UNet(axes=1, transposed=True)),
        normal(4, 1),
        _named("down", "low", "up", "out"),
        output="sequence",
        loss="sigmoid_binary_cross_entropy",
    ),
    "unet_2d": Row(
        linen(_UNet(axes=2, transposed=False)),
        normal(2, 2, 1),
        _named("down", "low", "out"),
        output="image",
        loss="sigmoid_binary_cross_entropy",
    ),
}

ROWS = BRANCHES | CONVOLUTIONAL
