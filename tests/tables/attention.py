"""Rows of the table of architectures: attention and transformers."""

from __future__ import annotations

import functools

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
    alone,
    block,
    dense_blocks,
    from_equinox,
    from_nnx,
    linen,
    mean_positions,
    normal,
    several,
    tokens,
)


def _attend(heads=2, features=4, **options):
    return nn.MultiHeadDotProductAttention(heads, qkv_features=features, **KINDS, **options)


class _LinenAttention(nn.Module):
    causal: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x):
        if self.cross:
            return _attend(name="attention")(x["query"], x["memory"])
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        h = _attend(name="attention")(x, mask=mask)
        return h if self.causal else mean_positions(jnp.tanh(h))


def _softmax_attention(query, key, value, **_):
    """All in the dtype of the inputs, unlike `jax.nn.dot_product_attention`."""
    scores = jnp.einsum("nthk,nshk->nhts", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(scores), value)


class _NnxAttention(nnx.Module):
    def __init__(self, rngs, **options):
        self.attention = nnx.MultiHeadAttention(
            2, 2, 4, decode=False, rngs=rngs, **KINDS, **options
        )

    def __call__(self, x):
        return mean_positions(jnp.tanh(self.attention(x)))


class _EquinoxAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        biases = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(2, 2, qk_size=2, vo_size=2, key=key, **biases)

    def __call__(self, x):
        return jnp.mean(jnp.tanh(self.attention(x, x, x)), axis=0)


class _EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm_1", **NORM)(x)
        h = x + _attend(1, 2, name="attention")(h)
        g = Dense(2, name="up")(nn.LayerNorm(name="norm_2", **NORM)(h))
        return h + Dense(3, name="down")(nn.gelu(g))


class _Transformer(nn.Module):
    """Embedding and positions, a block, the mean over positions and a dense layer."""

    @nn.compact
    def __call__(self, x):
        h = nn.Embed(4, 3, name="embed", **KINDS)(x)
        h = h + self.param("positions", nn.initializers.normal(), (3, 3), jnp.float64)
        return Dense(2, name="out")(mean_positions(_EncoderBlock(name="block")(h)))


class _VisionTransformer(nn.Module):
    """Patches, a class token in front, positions, attention, and the token read."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(3, (2, 2), strides=(2, 2), padding="VALID", name="patches", **KINDS)(x)
        h = h.reshape(len(x), -1, 3)
        token = self.param("token", nn.initializers.normal(), (1, 1, 3), jnp.float64)
        h = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), h], axis=1)
        h = h + self.param("positions", nn.initializers.normal(), (1, 3, 3), jnp.float64)
        h = h + _attend(1, 2, name="attention")(h)
        return Dense(2, name="out")(nn.LayerNorm(name="norm", **NORM)(jnp.tanh(h))[:, 0])


PARTS = ("query", "key", "value", "out")


def _attention_blocks(prefix: str) -> dict[str, tuple[str, ...]]:
    return dense_blocks(*(f"{prefix}/{part}" for part in PARTS))


def _encoder_blocks(prefix: str) -> dict[str, tuple[str, ...]]:
    return (
        block(f"{prefix}/norm_1", "scale", "bias")
        | _attention_blocks(f"{prefix}/attention")
        | block(f"{prefix}/norm_2", "scale", "bias")
        | dense_blocks(f"{prefix}/up", f"{prefix}/down")
    )


# The bias of the keys adds the same to all scores that a softmax compares.
_KEY_BIAS = ("params/attention/key/bias",)

ROWS = {
    "attention_linen": Row(
        linen(_LinenAttention()),
        normal(3, 2),
        _attention_blocks("params/attention"),
        output="pooled",
        flat=_KEY_BIAS,
    ),
    "attention_causal": Row(
        linen(_LinenAttention(causal=True)),
        normal(2, 2),
        _attention_blocks("params/attention"),
        output="sequence",
        loss="softmax_cross_entropy",
        flat=_KEY_BIAS,
    ),
    "attention_cross": Row(
        linen(_LinenAttention(cross=True)),
        several(query=normal(2, 2), memory=normal(3, 2)),
        _attention_blocks("params/attention"),
        output="sequence",
        flat=_KEY_BIAS,
    ),
    "attention_nnx": Row(
        from_nnx(functools.partial(_NnxAttention, attention_fn=_softmax_attention)),
        normal(3, 2),
        _attention_blocks("attention"),
        output="pooled",
        flat=("attention/key/bias",),
    ),
    "attention_nnx_defaults": Row(
        from_nnx(_NnxAttention),
        normal(3, 2),
        _attention_blocks("attention"),
        output="pooled",
        flat=("attention/key/bias",),
        tags=frozenset({"loose", "single"}),
    ),
    "attention_equinox": Row(
        from_equinox(_EquinoxAttention),
        normal(3, 2),
        {
            f"attention/{part}_proj": (
                f"attention/{part}_proj/weight", f"attention/{part}_proj/bias",
            )
            for part in ("query", "key", "value", "output")
        },
        output="pooled",
        flat=("attention/key_proj/bias",),
    ),
    "encoder_block": Row(
        linen(_EncoderBlock()),
        normal(2, 3),
        _encoder_blocks("params"),
        output="sequence",
        flat=_KEY_BIAS,
    ),
    "transformer": Row(
        linen(_Transformer()),
        tokens(4, 3),
        block("params/embed", "embedding")
        | block("params", "positions")
        | _encoder_blocks("params/block")
        | dense_blocks("params/out"),
        output="pooled",
        loss="softmax_cross_entropy",
        flat=("params/block/attention/key/bias",),
    ),
    "vision_transformer": Row(
        linen(_VisionTransformer()),
        normal(2, 4, 1),
        dense_blocks("params/patches", "params/out")
        | alone("params/token", "params/positions")
        | _attention_blocks("params/attention")
        | block("params/norm", "scale", "bias"),
        loss="softmax_cross_entropy",
        flat=_KEY_BIAS,
    ),
}  # fmt: skip
