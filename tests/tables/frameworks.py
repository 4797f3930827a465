"""Rows of the table of architectures: parameters as every library keeps them."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

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
    fill,
    from_equinox,
    from_nnx,
    linen,
    mean_positions,
    normal,
    plain,
    tokens,
)


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(**NORM)(nn.tanh(Dense(3)(x)))
        return Dense(2)(mean_positions(nn.Conv(2, (2,), **KINDS)(h)))


class _LinenSetup(nn.Module):
    """Layers in a list and a module inside a module."""

    def setup(self):
        self.layers = [Dense(2), Dense(2)]
        self.inner = _Linen()

    def __call__(self, x):
        for layer in self.layers:
            x = nn.tanh(layer(x))
        return self.inner(x)


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 2, (2,), rngs=rngs, **KINDS)
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs, **KINDS) for _ in range(2)])
        self.shift = nnx.Param(jnp.zeros(2))

    def __call__(self, x):
        h = mean_positions(nnx.tanh(self.conv(x))) + self.shift[...]
        return self.layers[1](nnx.tanh(self.layers[0](nnx.tanh(h))))


class _NnxNorms(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(4, 3, rngs=rngs, **KINDS)
        self.layer = nnx.LayerNorm(3, rngs=rngs, **KINDS)
        self.batch = nnx.BatchNorm(3, use_running_average=True, rngs=rngs, **KINDS)
        self.out = nnx.Linear(3, 2, rngs=rngs, **KINDS)

    def __call__(self, x):
        h = nnx.tanh(self.layer(self.embed(x)))
        return self.out(mean_positions(nnx.tanh(self.batch(h))))


class _NnxShared(nnx.Module):
    """A shared module: its one array has one path."""

    def __init__(self, rngs):
        self.first = nnx.Linear(2, 2, rngs=rngs, **KINDS)
        self.second = self.first

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


class _Equinox(eqx.Module):
    conv: eqx.nn.Conv1d
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    scale: jax.Array

    def __init__(self, key):
        self.conv = eqx.nn.Conv1d(1, 3, 2, key=key)
        self.norm = eqx.nn.LayerNorm(3)
        self.mlp = eqx.nn.MLP(3, 2, 2, depth=1, activation=jnp.tanh, key=key)
        self.scale = jnp.zeros(())

    def __call__(self, x):
        h = jax.vmap(self.norm)(self.conv(x).T)
        return self.mlp(self.scale * jnp.mean(jnp.tanh(h), axis=0))


class _EquinoxImage(eqx.Module):
    """Channels first, a pool, a transposed convolution and a group norm."""

    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    norm: eqx.nn.GroupNorm

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(1, 2, 2, key=key)
        self.up = eqx.nn.ConvTranspose2d(2, 2, 2, stride=2, key=key)
        self.norm = eqx.nn.GroupNorm(1, 2)

    def __call__(self, x):
        h = eqx.nn.AvgPool2d(2, 2)(jnp.tanh(self.conv(x)))
        return jnp.mean(jnp.tanh(self.norm(self.up(h))), axis=(1, 2))


def _haiku(p, x):
    h = x
    for name in ("net/~/linear", "net/~/linear_1"):
        h = jnp.tanh(affine(p[name], h))
    return h @ p["net/~/head"]["w"]


def _pairs(p, x):
    for kernel, bias in p[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = p[-1]
    return x @ kernel + bias


class Affine(NamedTuple):
    """A layer's parameters."""

    kernel: Any
    bias: Any


class Both(NamedTuple):
    """A model's parameters."""

    first: Affine
    out: Affine


def _named_tuples(p, x):
    return jnp.tanh(x @ p.first.kernel + p.first.bias) @ p.out.kernel + p.out.bias


def _flat_dict(p, x):
    return jnp.tanh(x @ p["kernel_1"] + p["bias_1"]) @ p["kernel_2"] + p["bias_2"]


def _frozen(inputs):
    """A pretrained body, closed over, under a trained head."""
    shapes = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float64),
              "b": jax.ShapeDtypeStruct((2,), jnp.float64)}  # fmt: skip
    body = fill({"first": shapes}, 7, jnp.float64)

    def model(p, x):
        h = jnp.tanh(affine(body["first"], x))
        return affine(p["out"], jnp.tanh(affine(p["second"], h)))

    layer = {name: jax.ShapeDtypeStruct((2, *s.shape[1:]), s.dtype) for name, s in shapes.items()}
    return model, {"second": layer, "out": layer}


def _frozen_middle(inputs):
    """Trained layers below and above a frozen one of the same flax module."""
    module = nn.Sequential([Dense(2), nn.tanh, Dense(2), nn.tanh, Dense(2)])
    layers = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    frozen = fill({"layers_2": layers.pop("layers_2")}, 7, jnp.float64)
    return lambda p, x: module.apply({"params": {**p["params"], **frozen}}, x), {"params": layers}


_LINEN = dense_blocks("Dense_0", "Conv_0", "Dense_1") | block("LayerNorm_0", "scale", "bias")


def _under(prefix: str, blocks: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{prefix}/{name}": tuple(f"{prefix}/{path}" for path in paths)
        for name, paths in blocks.items()
    }


ROWS = {
    "linen": Row(linen(_Linen()), normal(3, 2), _under("params", _LINEN), output="pooled"),
    "linen_setup": Row(
        linen(_LinenSetup()),
        normal(2, 2),
        dense_blocks("params/layers_0", "params/layers_1") | _under("params/inner", _LINEN),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "nnx": Row(
        from_nnx(_Nnx),
        normal(3, 2),
        dense_blocks("conv", "layers/0", "layers/1") | alone("shift"),
        output="pooled",
    ),
    "nnx_norms": Row(
        from_nnx(_NnxNorms),
        tokens(4, 3),
        block("embed", "embedding")
        | block("layer", "scale", "bias")
        | block("batch", "scale", "bias")
        | dense_blocks("out"),
        output="pooled",
        tags=frozenset({"loose"}),
    ),
    "nnx_shared_module": Row(from_nnx(_NnxShared), normal(2), dense_blocks("first")),
    "equinox": Row(
        from_equinox(_Equinox),
        normal(1, 4),
        {
            name: (f"{name}/weight", f"{name}/bias")
            for name in ("conv", "norm", "mlp/layers/0", "mlp/layers/1")
        }
        | alone("scale"),
        output="pooled",
    ),
    "equinox_image": Row(
        from_equinox(_EquinoxImage),
        normal(1, 3, 3),
        {name: (f"{name}/weight", f"{name}/bias") for name in ("conv", "up", "norm")},
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "haiku": Row(
        plain(
            _haiku,
            {
                "net/~/linear": {"w": (3, 2), "b": (2,)},
                "net/~/linear_1": {"w": (2, 3), "b": (3,)},
                "net/~/head": {"w": (3, 2)},
            },
        ),
        normal(3),
        affine_blocks("net/~/linear", "net/~/linear_1") | block("net/~/head", "w"),
        loss="softmax_cross_entropy",
    ),
    "tuples": Row(
        plain(_pairs, (((3, 2), (2,)), ((2, 3), (3,)), ((3, 2), (2,)))),
        normal(3),
        block("0", "0", "1") | block("1", "0", "1") | block("2", "0", "1"),
    ),
    "lists": Row(
        plain(_pairs, [[(3, 2), (2,)], [(2, 2), (2,)]]),
        normal(2, 3),
        block("0", "0", "1") | block("1", "0", "1"),
        output="sequence",
        loss="softmax_cross_entropy",
    ),
    "named_tuples": Row(
        plain(_named_tuples, Both(Affine((3, 2), (2,)), Affine((2, 2), (2,)))),
        normal(3),
        block("first", "kernel", "bias") | block("out", "kernel", "bias"),
    ),
    "flat_dict": Row(
        plain(_flat_dict, {"kernel_1": (3, 2), "bias_1": (2,), "kernel_2": (2, 2), "bias_2": (2,)}),
        normal(3),
        {"kernel_1": ("kernel_1", "bias_1"), "kernel_2": ("kernel_2", "bias_2")},
    ),
    "frozen": Row(_frozen, normal(3), affine_blocks("second", "out")),
    "frozen_middle": Row(
        _frozen_middle,
        normal(3),
        dense_blocks("params/layers_0", "params/layers_4"),
        loss="softmax_cross_entropy",
    ),
}
