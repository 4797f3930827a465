"""Rows of the table of architectures: one for every kind of layer."""

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
    linen,
    mean_positions,
    net,
    normal,
    plain,
    tokens,
)

FIRST, SECOND, THIRD, FOURTH = (f"params/layers_{i}" for i in range(4))
OUT: dict[str, Any] = {"w": (2, 2), "b": (2,)}

# Convolutions.


def _conv(*shape: int, kernel: tuple[int, ...], features: int = 2, **options: Any) -> Row:
    """A convolution, tanh, the mean over positions and a dense layer."""
    first = nn.Conv(features, kernel, **KINDS, **options)
    return Row(
        net(first, jnp.tanh, mean_positions, Dense(2)),
        normal(*shape),
        dense_blocks(FIRST, bias=options.get("use_bias", True)) | dense_blocks(FOURTH),
        output="pooled",
    )


def _conv_transpose(*shape: int, kernel: tuple[int, ...], **options: Any) -> Row:
    first = nn.ConvTranspose(2, kernel, **KINDS, **options)
    return Row(
        net(first, jnp.tanh, mean_positions, Dense(2)),
        normal(*shape),
        # The circular one folds its result before it adds the bias.
        (
            alone(f"{FIRST}/kernel", f"{FIRST}/bias")
            if options.get("padding") == "CIRCULAR"
            else dense_blocks(FIRST, bias=options.get("use_bias", True))
        )
        | dense_blocks(FOURTH),
        output="pooled",
    )


def _channels_first(p, x):
    h = jax.lax.conv_general_dilated(
        x, p["conv"]["w"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    h = jnp.tanh(h + p["conv"]["b"][:, None, None])
    return affine(p["out"], jnp.mean(h, axis=(2, 3)))


def _conv_vmapped(p, x):
    def one(image):
        h = jax.lax.conv_general_dilated(
            image[None], p["conv"]["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.tanh(h[0] + p["conv"]["b"])

    return affine(p["out"], mean_positions(jax.vmap(one)(x)))


CONVOLUTIONS = {
    "conv_1d": _conv(4, 2, kernel=(3,)),
    "conv_1d_valid": _conv(5, 2, kernel=(3,), padding="VALID"),
    "conv_1d_without_bias": _conv(4, 2, kernel=(2,), use_bias=False),
    "conv_1d_strided": _conv(5, 2, kernel=(3,), strides=(2,)),
    "conv_1d_padded": _conv(4, 2, kernel=(3,), padding=((2, 0),)),
    "conv_1d_circular": _conv(4, 2, kernel=(3,), padding="CIRCULAR"),
    "conv_1d_causal": _conv(4, 2, kernel=(3,), padding="CAUSAL"),
    "conv_1d_input_dilation": _conv(
        3, 2, kernel=(3,), input_dilation=(2,), padding=((1, 1),)
    ),
    "conv_1d_kernel_dilation": _conv(5, 2, kernel=(2,), kernel_dilation=(2,)),
    "conv_1d_groups": _conv(4, 4, kernel=(2,), feature_group_count=2),
    "conv_1d_pointwise": _conv(3, 2, kernel=(1,)),
    "conv_1d_over_frames": _conv(2, 3, 2, kernel=(2,)),
    "conv_1d_sequence": Row(
        net(nn.Conv(2, (3,), **KINDS), jnp.tanh, nn.Conv(2, (2,), **KINDS)),
        normal(3, 1),
        dense_blocks(FIRST, THIRD),
        output="sequence",
        loss="softmax_cross_entropy",
    ),
    "conv_1d_whole": Row(
        net(nn.Conv(3, (3,), padding="VALID", **KINDS), jnp.tanh, mean_positions, Dense(2)),
        normal(3, 2),
        dense_blocks(FIRST, FOURTH),
        loss="softmax_cross_entropy",
    ),
    "conv_1d_vmapped": Row(
        plain(_conv_vmapped, {"conv": {"w": (3, 2, 2), "b": (2,)}, "out": OUT}),
        normal(4, 2),
        affine_blocks("conv", "out"),
        output="pooled",
    ),
    "conv_2d": _conv(3, 3, 2, kernel=(2, 2)),
    "conv_2d_valid_strided": _conv(5, 4, 1, kernel=(3, 2), strides=(2, 1), padding="VALID"),
    "conv_2d_strided": _conv(4, 3, 1, kernel=(3, 3), strides=(2, 2)),
    "conv_2d_padded": _conv(3, 2, 1, kernel=(2, 3), padding=((1, 0), (0, 2))),
    "conv_2d_circular": _conv(3, 3, 1, kernel=(3, 2), padding="CIRCULAR"),
    "conv_2d_dilations": _conv(
        3, 3, 1, kernel=(2, 2), input_dilation=(2, 1), kernel_dilation=(1, 2),
        padding=((1, 0), (0, 1)),
    ),
    "conv_2d_groups": _conv(3, 3, 4, kernel=(2, 2), feature_group_count=2),
    "conv_2d_depthwise": _conv(3, 3, 2, kernel=(2, 2), features=4, feature_group_count=2),
    "conv_2d_separable": Row(
        net(
            nn.Conv(2, (2, 2), feature_group_count=2, use_bias=False, **KINDS),
            nn.Conv(3, (1, 1), **KINDS),
            jnp.tanh,
            mean_positions,
            Dense(2),
        ),
        normal(3, 3, 2),
        dense_blocks(FIRST, bias=False) | dense_blocks(SECOND, "params/layers_4"),
        output="pooled",
    ),
    "conv_2d_all_options": _conv(
        4, 3, 2, kernel=(2, 3), strides=(2, 1), padding=((1, 2), (0, 1)), feature_group_count=2,
        kernel_dilation=(2, 1), input_dilation=(1, 2),
    ),
    "conv_2d_image": Row(
        net(nn.Conv(2, (2, 2), **KINDS), jnp.tanh, nn.Conv(1, (2, 1), **KINDS)),
        normal(2, 2, 1),
        dense_blocks(FIRST, THIRD),
        output="image",
        loss="sigmoid_binary_cross_entropy",
    ),
    "conv_2d_flattened": Row(
        net(nn.Conv(2, (2, 2), **KINDS), jnp.tanh, lambda x: x.reshape(len(x), -1), Dense(2)),
        normal(2, 3, 1),
        dense_blocks(FIRST, FOURTH),
        loss="softmax_cross_entropy",
    ),
    "conv_2d_channels_first": Row(
        plain(_channels_first, {"conv": {"w": (2, 1, 2, 2), "b": (2,)}, "out": OUT}),
        normal(1, 3, 3),
        affine_blocks("conv", "out"),
        output="pooled",
    ),
    "conv_3d": _conv(2, 3, 2, 1, kernel=(2, 2, 2)),
    "conv_3d_strided": _conv(3, 3, 3, 1, kernel=(2, 1, 2), strides=(2, 1, 1), padding="VALID"),
    "conv_transpose_1d": _conv_transpose(3, 2, kernel=(3,), strides=(2,)),
    "conv_transpose_1d_valid": _conv_transpose(3, 2, kernel=(2,), padding="VALID", use_bias=False),
    "conv_transpose_1d_circular": _conv_transpose(
        3, 2, kernel=(3,), strides=(2,), padding="CIRCULAR"
    ),
    "conv_transpose_2d": _conv_transpose(2, 2, 1, kernel=(2, 2), strides=(2, 2)),
    "conv_transpose_2d_turned": _conv_transpose(
        2, 3, 1, kernel=(3, 2), strides=(2, 1), transpose_kernel=True
    ),
}  # fmt: skip

# Dense layers on several positions.

DENSE = {
    "dense_sequence": Row(
        net(Dense(3), jnp.tanh, Dense(2)),
        normal(3, 2),
        dense_blocks(FIRST, THIRD),
        output="sequence",
        loss="softmax_cross_entropy",
    ),
    "dense_sequence_without_bias": Row(
        net(Dense(3, use_bias=False), jnp.tanh, Dense(2, use_bias=False)),
        normal(3, 2),
        dense_blocks(FIRST, THIRD, bias=False),
        output="sequence",
        loss="sigmoid_binary_cross_entropy",
    ),
    "dense_sequence_pooled": Row(
        net(Dense(3), jnp.tanh, mean_positions, Dense(2)),
        normal(4, 2),
        dense_blocks(FIRST, FOURTH),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "dense_sequence_pooled_at_the_end": Row(
        net(Dense(3), jnp.tanh, Dense(2), mean_positions),
        normal(3, 2),
        dense_blocks(FIRST, THIRD),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "dense_sequence_last_read": Row(
        net(Dense(3), lambda x: jnp.cumsum(jnp.tanh(x), axis=1)[:, -1], Dense(2)),
        normal(3, 2),
        dense_blocks(FIRST, THIRD),
        output="pooled",
    ),
    "dense_sequence_flattened": Row(
        net(Dense(2), lambda x: jnp.tanh(x).reshape(len(x), -1), Dense(2)),
        normal(3, 2),
        dense_blocks(FIRST, THIRD),
    ),
    "dense_grid": Row(
        net(Dense(3), jnp.tanh, Dense(2), mean_positions),
        normal(2, 2, 2),
        dense_blocks(FIRST, THIRD),
        output="pooled",
    ),
    "dense_grid_without_bias": Row(
        net(Dense(2, use_bias=False), jnp.tanh, Dense(1, use_bias=False)),
        normal(2, 2, 2),
        dense_blocks(FIRST, THIRD, bias=False),
        output="image",
    ),
    "dense_general": Row(
        net(
            nn.DenseGeneral((2, 2), **KINDS),
            jnp.tanh,
            nn.DenseGeneral(2, axis=(-2, -1), **KINDS),
        ),
        normal(3),
        dense_blocks(FIRST, THIRD),
        loss="softmax_cross_entropy",
    ),
    "dense_general_sequence": Row(
        net(
            nn.DenseGeneral((2, 2), **KINDS),
            jnp.tanh,
            nn.DenseGeneral(2, axis=(-2, -1), **KINDS),
        ),
        normal(2, 3),
        dense_blocks(FIRST, THIRD),
        output="sequence",
        loss="softmax_cross_entropy",
    ),
}

# Embeddings.


class _TiedEmbedding(nn.Module):
    pool: bool

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(4, 2, name="embed", **KINDS)
        h = jnp.tanh(Dense(2, name="dense")(embed(x)))
        return embed.attend(mean_positions(h) if self.pool else h)


class _WithPositions(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Embed(4, 2, name="tokens", **KINDS)(x)
        h = h + nn.Embed(3, 2, name="positions", **KINDS)(jnp.arange(3))
        return Dense(2, name="out")(mean_positions(jnp.tanh(h)))


def _indexed(p, x):
    return affine(p["out"], jnp.tanh(p["table"][x]))


def _one_hot(p, x):
    return affine(p["out"], jnp.tanh(jax.nn.one_hot(x, 4, dtype=p["table"].dtype) @ p["table"]))


EMBEDDINGS = {
    "embed": Row(
        net(nn.Embed(5, 2, **KINDS), jnp.tanh, mean_positions, Dense(2)),
        tokens(5, 3),
        block(FIRST, "embedding") | dense_blocks(FOURTH),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "embed_alone": Row(
        linen(nn.Embed(4, 2, **KINDS)),
        tokens(4, 2),
        block("params", "embedding"),
        output="sequence",
    ),
    "embed_indexed": Row(
        plain(_indexed, {"table": (4, 2), "out": OUT}),
        tokens(4),
        alone("table") | affine_blocks("out"),
    ),
    "embed_one_hot": Row(
        plain(_one_hot, {"table": (4, 2), "out": OUT}),
        tokens(4),
        alone("table") | affine_blocks("out"),
    ),
    "embed_tied": Row(
        linen(_TiedEmbedding(pool=False)),
        tokens(4, 2),
        block("params/embed", "embedding") | dense_blocks("params/dense"),
        output="sequence",
        loss="softmax_cross_entropy",
    ),
    "embed_tied_pooled": Row(
        linen(_TiedEmbedding(pool=True)),
        tokens(4, 3),
        block("params/embed", "embedding") | dense_blocks("params/dense"),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
    "embed_with_positions": Row(
        linen(_WithPositions()),
        tokens(4, 3),
        block("params/tokens", "embedding")
        | block("params/positions", "embedding")
        | dense_blocks("params/out"),
        output="pooled",
        loss="softmax_cross_entropy",
    ),
}

# Scales and shifts.


def _normalized(
    norm: nn.Module, *shape: int, features: int = 3, leaves=("scale", "bias"), **options: Any
) -> Row:
    """A dense layer, the normalization, tanh, the mean over positions and a dense layer."""
    return Row(
        net(Dense(features), norm, lambda x: mean_positions(jnp.tanh(x)), Dense(2)),
        normal(*shape),
        dense_blocks(FIRST, FOURTH) | block(SECOND, *leaves),
        output="vector" if len(shape) == 1 else "pooled",
        **options,
    )


NORMS = {
    "layer_norm": _normalized(nn.LayerNorm(**NORM), 3),
    "layer_norm_defaults": _normalized(nn.LayerNorm(**KINDS), 3, tags=frozenset({"loose"})),
    "layer_norm_sequence": _normalized(nn.LayerNorm(**NORM), 3, 2),
    "layer_norm_scale_only": _normalized(
        nn.LayerNorm(use_bias=False, **NORM), 3, leaves=("scale",)
    ),
    "layer_norm_shift_only": _normalized(
        nn.LayerNorm(use_scale=False, **NORM), 3, leaves=("bias",)
    ),
    "layer_norm_of_data": Row(
        net(nn.LayerNorm(**NORM), Dense(2)),
        normal(3),
        block(FIRST, "scale", "bias") | dense_blocks(SECOND),
        loss="softmax_cross_entropy",
    ),
    "rms_norm": _normalized(nn.RMSNorm(**NORM), 3, 2, leaves=("scale",)),
    "group_norm": _normalized(nn.GroupNorm(num_groups=2, **NORM), 3, 2, features=4),
    "batch_norm": _normalized(nn.BatchNorm(use_running_average=True, **NORM), 3),
    "batch_norm_sequence": _normalized(nn.BatchNorm(use_running_average=True, **NORM), 3, 2),
    "prelu": Row(
        net(Dense(3), nn.PReLU(param_dtype=jnp.float64), Dense(2)),
        normal(3),
        dense_blocks(FIRST, THIRD) | block(SECOND, "negative_slope"),
    ),
}

# Parameters that add and multiply by themselves.


def _positions_added(p, x):
    return affine(p["out"], mean_positions(jnp.tanh(x + p["positions"])))


def _token_prepended(p, x):
    token = jnp.broadcast_to(p["token"], (x.shape[0], 1, 2))
    h = jnp.concatenate([token, x], axis=1)
    return affine(p["out"], mean_positions(jnp.tanh(affine(p["mix"], h))))


def _hidden(p, x):
    return jnp.tanh(affine(p["first"], x))


def _around(middle):
    """Dense layer, tanh, `middle`, tanh, dense layer."""
    return lambda p, x: affine(p["out"], jnp.tanh(middle(p, _hidden(p, x))))


def _bare(middle, shapes: dict[str, Any], *shape: int, **options: Any) -> Row:
    return Row(
        plain(_around(middle), {"first": {"w": (2, 2), "b": (2,)}, "out": OUT, **shapes}),
        normal(*shape),
        affine_blocks("first", "out") | options.pop("expected", alone(*shapes)),
        **options,
    )


BARE = {
    "positions_added": Row(
        plain(_positions_added, {"positions": (3, 2), "out": OUT}),
        normal(3, 2),
        alone("positions") | affine_blocks("out"),
        output="pooled",
    ),
    "token_added": Row(
        plain(lambda p, x: affine(p["out"], mean_positions(jnp.tanh(x + p["token"]))),
              {"token": (2,), "out": OUT}),
        normal(3, 2),
        alone("token") | affine_blocks("out"),
        output="pooled",
    ),
    "token_prepended": Row(
        plain(_token_prepended, {"token": (2,), "mix": OUT, "out": OUT}),
        normal(2, 2),
        alone("token") | affine_blocks("mix", "out"),
        output="pooled",
    ),
    "scalar_scale": _bare(lambda p, h: p["scale"] * h, {"scale": ()}, 2),
    "scalar_scale_sequence": _bare(
        lambda p, h: p["scale"] * h, {"scale": ()}, 2, 2, output="sequence"
    ),
    "scalar_shift": _bare(lambda p, h: h - p["shift"], {"shift": ()}, 2),
    "vector_scale": _bare(lambda p, h: h * p["scale"], {"scale": (2,)}, 2),
    "vector_scale_sequence": _bare(
        lambda p, h: h * p["scale"], {"scale": (2,)}, 2, 2, output="sequence"
    ),
    "position_scale": _bare(
        lambda p, h: h * p["scale"], {"scale": (2, 1)}, 2, 2, output="sequence"
    ),
    "one_plus_scale": _bare(lambda p, h: h * (1 + p["w"]), {"w": (2,)}, 2),
    "scale_and_shift": _bare(
        lambda p, h: h * p["norm"]["scale"] + p["norm"]["shift"],
        {"norm": {"scale": (2,), "shift": (2,)}},
        2, 2,
        expected=block("norm", "scale", "shift"),
        output="sequence",
    ),
    "scaled_output": Row(
        plain(lambda p, x: affine(p["out"], x) * p["temperature"], {"out": OUT, "temperature": ()}),
        normal(2),
        affine_blocks("out") | alone("temperature"),
        loss="softmax_cross_entropy",
    ),
}  # fmt: skip

ROWS = CONVOLUTIONS | DENSE | EMBEDDINGS | NORMS | BARE
