"""Rows of the table of architectures: loops over layers, over positions and over time."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.tables.rows import (
    KINDS,
    Dense,
    Row,
    affine,
    affine_blocks,
    alone,
    block,
    dense_blocks,
    from_equinox,
    from_nnx,
    linen,
    normal,
    plain,
)

OUT: dict[str, Any] = {"w": (2, 2), "b": (2,)}
TWO = {"first": {"w": (3, 2), "b": (2,)}, "out": OUT}

# Loops over layers.


def _scan_layers(body):
    def model(p, x):
        h, _ = jax.lax.scan(lambda h, layer: (body(layer, h), None), x, p["layers"])
        return affine(p["out"], h)

    return model


def _tanh_layer(layer, h):
    return jnp.tanh(affine(layer, h))


class _Body(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return h + nn.tanh(Dense(2, name="dense")(h)), None


class _ScannedLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(_Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        h, _ = layers(name="layers")(x, None)
        return Dense(2, name="out")(h)


class _NnxBody(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 2, rngs=rngs, **KINDS)

    def __call__(self, h):
        return h + nnx.tanh(self.dense(h))


class _NnxScanned(nnx.Module):
    def __init__(self, rngs):
        make = nnx.split_rngs(splits=2)(nnx.vmap(_NnxBody, in_axes=(0,), out_axes=0))
        self.layers = make(rngs)
        self.out = nnx.Linear(2, 2, rngs=rngs, **KINDS)

    def __call__(self, x):
        forward = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.out(forward(x, self.layers))


def _mapped(p, x):
    h = jax.lax.map(lambda v: jnp.tanh(affine(p["first"], v)), jnp.swapaxes(x, 0, 1))
    return affine(p["out"], jnp.mean(h, axis=0))


def _mapped_examples(p, x):
    return jax.lax.map(lambda v: affine(p["out"], jnp.tanh(affine(p["first"], v))), x)


_STACK = {"layers": {"w": (2, 2, 2), "b": (2, 2)}, "out": OUT}
_PLAIN = affine_blocks("first", "out")
_STACKED = affine_blocks("layers", "out")

LAYER_LOOPS = {
    "scan_layers": Row(plain(_scan_layers(_tanh_layer), _STACK), normal(2), _STACKED),
    "scan_layers_checkpoint": Row(
        plain(_scan_layers(jax.checkpoint(_tanh_layer)), _STACK), normal(2), _STACKED
    ),
    "scan_layers_sequence": Row(
        plain(_scan_layers(_tanh_layer), _STACK), normal(2, 2), _STACKED, output="sequence"
    ),
    "linen_scan_layers": Row(
        linen(_ScannedLayers()), normal(2), dense_blocks("params/layers/dense", "params/out")
    ),
    "nnx_scan_layers": Row(from_nnx(_NnxScanned), normal(2), dense_blocks("layers/dense", "out")),
    "map_positions": Row(plain(_mapped, TWO), normal(2, 3), _PLAIN, output="pooled"),
    "map_examples": Row(plain(_mapped_examples, TWO), normal(3), _PLAIN),
}

# Recurrent networks.


def _step(p, h, x):
    return jnp.tanh(affine(p["input"], x) + h @ p["hidden"])


def _rnn_scan(p, x, reverse=False):
    start = jnp.zeros((x.shape[0], 2), x.dtype)

    def body(h, v):
        h = _step(p, h, v)
        return h, h

    return jax.lax.scan(body, start, jnp.swapaxes(x, 0, 1), reverse=reverse)


def _rnn_last(p, x, **options):
    return affine(p["out"], _rnn_scan(p, x, **options)[0])


def _rnn_sequence(p, x):
    return affine(p["out"], jnp.swapaxes(_rnn_scan(p, x)[1], 0, 1))


def _rnn_python(p, x):
    h = jnp.zeros((x.shape[0], 2), x.dtype)
    for t in range(x.shape[1]):
        h = _step(p, h, x[:, t])
    return affine(p["out"], h)


class _LinenRecurrent(nn.Module):
    cell: Any
    whole: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.RNN(self.cell(2, **KINDS, name="cell"))(x)
        return Dense(2, name="out")(h if self.whole else h[:, -1])


class _NnxRecurrent(nnx.Module):
    def __init__(self, rngs, cell):
        self.rnn = nnx.RNN(cell(1, 2, rngs=rngs, **KINDS), rngs=rngs)
        self.out = nnx.Linear(2, 2, rngs=rngs, **KINDS)

    def __call__(self, x):
        return self.out(self.rnn(x, rngs=nnx.Rngs(0))[:, -1])


class _EquinoxRecurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, key):
        self.cell = eqx.nn.GRUCell(1, 2, key=key)
        self.out = eqx.nn.Linear(2, 2, key=key)

    def __call__(self, x):
        start = jnp.zeros(2, x.dtype)
        h, _ = jax.lax.scan(lambda h, v: (self.cell(v, h), None), start, x)
        return self.out(h)


def _cell(*names, bias=True):
    return dense_blocks(*(f"params/cell/{name}" for name in names), bias=bias)


_RNN = {"input": {"w": (1, 2), "b": (2,)}, "hidden": (2, 2), "out": OUT}
_RNN_BLOCKS = affine_blocks("input", "out") | alone("hidden")
_LINEN_GRU = _cell("ir", "iz", "in", "hn") | _cell("hr", "hz", bias=False)
_LINEN_LSTM = _cell("hi", "hf", "hg", "ho") | _cell("ii", "if", "ig", "io", bias=False)
_LINEN_JOINED = {  # kernels of all gates in one product
    f"params/cell/{side}i": tuple(f"params/cell/{side}{gate}/{leaf}" for leaf in leaves
                                  for gate in "ifgo")
    for side, leaves in (("i", ["kernel"]), ("h", ["kernel", "bias"]))
}  # fmt: skip
_LINEN_OUT = dense_blocks("params/out")

RECURRENT = {
    "rnn_scan": Row(plain(_rnn_last, _RNN), normal(3, 1), _RNN_BLOCKS, output="pooled"),
    "rnn_scan_reverse": Row(
        plain(functools.partial(_rnn_last, reverse=True), _RNN),
        normal(3, 1),
        _RNN_BLOCKS,
        output="pooled",
    ),
    "rnn_scan_sequence": Row(
        plain(_rnn_sequence, _RNN),
        normal(3, 1),
        _RNN_BLOCKS,
        output="sequence",
        loss="softmax_cross_entropy",
    ),
    "rnn_loop": Row(plain(_rnn_python, _RNN), normal(3, 1), _RNN_BLOCKS, output="pooled"),
    "linen_gru": Row(
        linen(_LinenRecurrent(nn.GRUCell)), normal(2, 1), _LINEN_GRU | _LINEN_OUT, output="pooled"
    ),
    "linen_gru_sequence": Row(
        linen(_LinenRecurrent(nn.GRUCell, whole=True)),
        normal(2, 1),
        _LINEN_GRU | _LINEN_OUT,
        output="sequence",
    ),
    "linen_optimized_lstm": Row(
        linen(_LinenRecurrent(nn.OptimizedLSTMCell)),
        normal(3, 1),
        _LINEN_JOINED | _LINEN_OUT,
        output="pooled",
    ),
    "linen_lstm": Row(
        linen(_LinenRecurrent(nn.LSTMCell)),
        normal(2, 1),
        _LINEN_LSTM | _LINEN_OUT,
        output="pooled",
    ),
    "linen_simple_cell": Row(
        linen(_LinenRecurrent(nn.SimpleCell)),
        normal(3, 1),
        _cell("i") | _cell("h", bias=False) | _LINEN_OUT,
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "nnx_gru": Row(
        from_nnx(functools.partial(_NnxRecurrent, cell=nnx.GRUCell)),
        normal(3, 1),
        dense_blocks("rnn/cell/dense_i", "out") | dense_blocks("rnn/cell/dense_h", bias=False),
        output="pooled",
    ),
    "equinox_gru": Row(
        from_equinox(_EquinoxRecurrent),
        normal(2, 1),
        {
            "cell/weight_ih": ("cell/weight_ih", "cell/bias"),
            "cell/weight_hh": ("cell/weight_hh",),
            "cell/bias_n": ("cell/bias_n",),
        }
        | block("out", "weight", "bias"),
        output="pooled",
    ),
}

ROWS = LAYER_LOOPS | RECURRENT
