"""Rows of the table of architectures: the ways a parameter reaches its layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.tables.rows import (
    KINDS,
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
    several,
    tokens,
)

OUT: dict[str, Any] = {"w": (2, 2), "b": (2,)}
TWO = {"first": {"w": (3, 2), "b": (2,)}, "out": OUT}


def _first(layer, shape=(3,), first=TWO["first"], **options):
    """`layer`, tanh, the mean over positions and a plain dense layer."""

    def model(p, x):
        return affine(p["out"], mean_positions(jnp.tanh(layer(p["first"], x))))

    options = {"output": "vector" if len(shape) == 1 else "pooled"} | options
    expected = {name: (f"{name}/w", f"{name}/b")[: len(p)] for name, p in
                (("first", first), ("out", OUT))}  # fmt: skip
    return Row(plain(model, {"first": first, "out": OUT}), normal(*shape), expected, **options)


# Products.

_KERNEL = {"w": (3, 2)}
_TURNED = {"w": (2, 3), "b": (2,)}

PRODUCTS = {
    "matmul": _first(affine),
    "matmul_without_bias": _first(lambda p, x: x @ p["w"], first=_KERNEL),
    "matmul_left": _first(lambda p, x: jax.vmap(lambda v: p["w"] @ v + p["b"])(x), first=_TURNED),
    "matmul_left_sequence": _first(
        lambda p, x: jax.vmap(jax.vmap(lambda v: p["w"] @ v + p["b"]))(x), (3, 3), _TURNED
    ),
    "matmul_left_of_columns": _first(
        lambda p, x: jnp.swapaxes(p["w"] @ x, 1, 2) + p["b"], (3, 2), _TURNED
    ),
    "matmul_transposed": _first(lambda p, x: x @ p["w"].T + p["b"], first=_TURNED),
    "einsum": _first(lambda p, x: jnp.einsum("nd,do->no", x, p["w"]) + p["b"]),
    "einsum_turned": _first(
        lambda p, x: jnp.einsum("od,ntd->nto", p["w"], x) + p["b"], (3, 3), _TURNED
    ),
    "einsum_heads": _first(
        lambda p, x: jnp.sum(jnp.tanh(jnp.einsum("ntd,dhk->nthk", x, p["w"]) + p["b"]), axis=2),
        (2, 3),
        {"w": (3, 2, 2), "b": (2, 2)},
    ),
    "einsum_joined": _first(
        lambda p, x: jnp.einsum("nhtk,hko->nto", x, p["w"]) + p["b"],
        (2, 3, 2),
        {"w": (2, 2, 2), "b": (2,)},
    ),
    "einsum_over_positions": _first(
        lambda p, x: jnp.einsum("ntd,ts->nsd", x, p["w"]) + p["b"][:, None],
        (3, 2),
        {"w": (3, 2), "b": (2,)},
    ),
    "einsum_per_head": _first(
        lambda p, x: jnp.sum(jnp.tanh(jnp.einsum("nhd,hdo->nho", x, p["w"]) + p["b"]), axis=1),
        (2, 3),
        {"w": (2, 3, 2), "b": (2, 2)},
        output="vector",
    ),
    "tensordot": _first(
        lambda p, x: jnp.tensordot(x, p["w"], axes=((1, 2), (1, 0))) + p["b"],
        (2, 2),
        {"w": (2, 2, 2), "b": (2,)},
        output="vector",
    ),
    "kernel_halved": _first(lambda p, x: x @ (0.5 * p["w"]) + p["b"]),
    "kernel_reshaped": _first(
        lambda p, x: x @ p["w"].reshape(3, 2) + p["b"], first={"w": (6,), "b": (2,)}
    ),
    "bias_subtracted": _first(lambda p, x: x @ p["w"] - p["b"]),
    "bias_first": _first(lambda p, x: p["b"] + x @ p["w"]),
    "bias_subtracted_from": _first(lambda p, x: p["b"] - x @ p["w"]),
    "bias_broadcast": _first(
        lambda p, x: x @ p["w"] + jnp.broadcast_to(p["b"][None, None], (*x.shape[:2], 2)), (2, 3)
    ),
}

# Calls and custom rules.


@jax.custom_jvp
def soft_sign(x: jax.Array) -> jax.Array:
    """With a derivative rule of its own, for forward mode."""
    return x / (1 + jnp.abs(x))


@soft_sign.defjvp
def _soft_sign_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return soft_sign(x), t / (1 + jnp.abs(x)) ** 2


@jax.custom_vjp
def bounded(x: jax.Array) -> jax.Array:
    """With a derivative rule of its own, for reverse mode only."""
    return jnp.tanh(x)


bounded.defvjp(
    lambda x: (jnp.tanh(x), jnp.tanh(x)),
    lambda y, cotangent: (cotangent * (1 - y**2),),
)


def _activated(activation):
    return lambda p, x: affine(p["out"], activation(affine(p["first"], x)))


def _vmapped_model(p, x):
    def one(v):
        return affine(p["out"], jnp.mean(jax.vmap(lambda u: jnp.tanh(affine(p["first"], u)))(v), 0))

    return jax.vmap(one)(x)


def _ensemble(p, x):
    members = jax.vmap(lambda layer: jnp.tanh(affine(layer, x)))(p["members"])
    return affine(p["out"], jnp.mean(members, axis=0))


def _bf16_by_hand(p, x):
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
    h = jnp.tanh(affine(low["first"], x.astype(jnp.bfloat16)))
    return affine(low["out"], h).astype(jnp.float32)


class _HalfPrecision(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(3, dtype=jnp.bfloat16, name="first")(x))
        h = nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(h) if self.norm else h
        return nn.Dense(2, dtype=jnp.bfloat16, name="out")(h).astype(jnp.float32)


class _Called(nn.Module):
    """Two dense layers, the first wrapped by a transformation of flax."""

    transform: Any

    @nn.compact
    def __call__(self, x):
        h = nn.tanh(self.transform(nn.Dense)(2, name="first", **KINDS)(x))
        return Dense(2, name="out")(h)


_PLAIN = affine_blocks("first", "out")
_FLAX = dense_blocks("params/first", "params/out")

CALLS = {
    "jit_inside": _first(jax.jit(affine)),
    "checkpoint": _first(jax.checkpoint(lambda p, x: jnp.sin(affine(p, x)))),
    "linen_jit": Row(linen(_Called(nn.jit)), normal(3), _FLAX),
    "linen_remat": Row(linen(_Called(nn.remat)), normal(3), _FLAX),
    "vmap_inside": Row(plain(_vmapped_model, TWO), normal(2, 3), _PLAIN, output="pooled"),
    "vmap_of_parameters": Row(
        plain(_ensemble, {"members": {"w": (2, 3, 2), "b": (2, 2)}, "out": OUT}),
        normal(3),
        affine_blocks("members", "out"),
    ),
    "custom_jvp": Row(plain(_activated(soft_sign), TWO), normal(3), _PLAIN),
    "custom_vjp": Row(plain(_activated(bounded), TWO), normal(3), _PLAIN),
    "bf16_linen": Row(linen(_HalfPrecision()), normal(3), _FLAX, tags=frozenset({"bf16"})),
    "bf16_linen_norm": Row(
        linen(_HalfPrecision(norm=True)),
        normal(3),
        _FLAX | block("params/norm", "scale", "bias"),
        tags=frozenset({"bf16", "loose"}),
    ),
    "bf16_by_hand": Row(
        plain(_bf16_by_hand, TWO),
        normal(3),
        _PLAIN,
        loss="softmax_cross_entropy",
        tags=frozenset({"bf16"}),
    ),
}

# Kernels that are functions of parameters.


def _weight_norm(p, x):
    kernel = p["g"] * p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, axis=0))
    return affine(p["out"], jnp.tanh(x @ kernel))


def _standardized(p, x):
    centered = p["conv"] - jnp.mean(p["conv"], axis=(0, 1))
    kernel = centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=(0, 1)) + 1e-3)
    h = jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return affine(p["out"], mean_positions(jnp.tanh(h)))


def _low_rank(p, x):
    return affine(p["out"], jnp.tanh(x @ (p["left"] @ p["right"])))


def _merged(p, x):
    """A low-rank update that is added to a kernel which stays."""
    frozen = jnp.cos(jnp.arange(6.0, dtype=x.dtype)).reshape(3, 2)
    kernel = frozen + 0.5 / jnp.sqrt(jnp.asarray(3.0, x.dtype)) * (p["left"] @ p["right"].T)
    return affine(p["out"], jnp.tanh(x @ kernel + p["b"]))


def _masked_and_scaled(p, x):
    """A mask, constants by row and by column, functions of every entry, and a temperature."""
    h = jnp.tanh(x @ jnp.tril(p["masked"]["w"]) + p["masked"]["b"])
    one = jnp.ones((), x.dtype)
    scale = jnp.arange(1.0, 3.0, dtype=x.dtype)
    h = jnp.tanh(h @ (p["scaled"] * scale / jnp.sqrt(2 * one) * jnp.sqrt(scale)[:, None]))
    return affine(p["out"], h) / jnp.exp(p["t"])


def _joined(p, x):
    kernel = jnp.concatenate([p["left"]["w"], p["right"]["w"]], axis=1)
    h = x @ kernel + jnp.concatenate([p["left"]["b"], p["right"]["b"]])
    return affine(p["out"], jnp.tanh(jnp.tanh(h) @ jnp.pad(p["padded"], ((0, 0), (0, 1)))))


def _complex(p, x):
    """A complex kernel, and a filter of a Fourier transform between layers."""
    h = jnp.fft.fft(x) @ (p["re"] + 1j * p["im"])
    gains = jax.lax.complex(p["gain"][0], p["gain"][1])
    h = jnp.fft.ifft(jnp.fft.fft(jnp.abs(h)) * gains)
    return affine(p["out"], jnp.real(h) + jnp.imag(h))


def _experts(p, inputs):
    """Two kernels for each example, chosen by data and weighed by data."""
    h = jnp.tanh(affine(p["first"], inputs["x"]))
    routed = jnp.einsum("nkio,nki->nko", p["experts"][inputs["index"]], h)
    return affine(p["out"], jnp.sum(jnp.tanh(routed) * inputs["weight"][..., None], axis=1))


def _branches(p, x):
    """A branch that each example chooses, with a layer or without."""

    def one(x):
        inside = lambda h: jnp.tanh(affine(p["inside"], h))  # noqa: E731
        return jax.lax.cond(x[0] > 0, inside, jnp.sin, affine(p["first"], x))

    return affine(p["out"], jax.vmap(one)(x))


DERIVED = {
    "weight_norm": Row(
        plain(_weight_norm, {"g": (2,), "v": (3, 2), "out": OUT}),
        normal(3),
        affine_blocks("out"),
        unassigned=("g", "v"),
    ),
    "weight_norm_linen": Row(
        net(
            nn.WeightNorm(Dense(2, use_bias=False), **KINDS),
            jnp.tanh,
            Dense(2),
        ),
        normal(3),
        dense_blocks("params/layers_2"),
        unassigned=(
            "params/layers_0/layer_instance/kernel",
            "params/layers_0/layer_instance/kernel/scale",
        ),
    ),
    "weight_standardized": Row(
        plain(_standardized, {"conv": (3, 2, 2), "out": OUT}),
        normal(4, 2),
        affine_blocks("out"),
        unassigned=("conv",),
        output="pooled",
    ),
    "product_of_kernels": Row(
        plain(_low_rank, {"left": (3, 1), "right": (1, 2), "out": OUT}),
        normal(3),
        alone("left", "right") | affine_blocks("out"),
    ),
    "merged_low_rank": Row(
        plain(_merged, {"left": (3, 1), "right": (2, 1), "b": (2,), "out": OUT}),
        normal(3),
        alone("left", "right", "b") | affine_blocks("out"),
    ),
    "masked_and_scaled": Row(
        plain(_masked_and_scaled, {"masked": TWO["first"], "scaled": (2, 2), "t": (), "out": OUT}),
        normal(3),
        affine_blocks("masked", "out") | alone("scaled", "t"),
        loss="softmax_cross_entropy",
    ),
    "joined_kernels": Row(
        plain(_joined, {"left": {"w": (3, 1), "b": (1,)}, "right": {"w": (3, 1), "b": (1,)},
                        "padded": (2, 1), "out": OUT}),
        normal(3),
        {"left": ("left/w", "right/w", "left/b", "right/b"), "padded": ("padded",)}
        | affine_blocks("out"),
    ),
    "complex_kernel": Row(
        plain(_complex, {"re": (3, 2), "im": (3, 2), "gain": (2, 2), "out": OUT}),
        normal(3),
        alone("re", "im", "gain") | affine_blocks("out"),
        tags=frozenset({"loose"}),
    ),
    "experts": Row(
        plain(_experts, {"first": {"w": (3, 3), "b": (3,)}, "experts": (3, 3, 2), "out": OUT}),
        several(x=normal(2, 3), index=tokens(3, 2), weight=normal(2)),
        affine_blocks("first", "out") | alone("experts"),
        output="pooled",
    ),
    "branches": Row(
        plain(_branches, TWO | {"inside": {"w": (2, 2), "b": (2,)}}),
        normal(3),
        affine_blocks("first", "inside", "out"),
    ),
}  # fmt: skip

# Parameters used more than once.


def _tied(p, x):
    return affine(p["out"], jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]))


def _tied_with_bias(p, x):
    h = jnp.tanh(affine(p["first"], x))
    return affine(p["out"], jnp.tanh(affine(p["first"], h)))


def _tied_transposed(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


def _tied_scale(p, x):
    h = jnp.tanh(p["scale"] * affine(p["first"], x))
    return affine(p["out"], p["scale"] * h)


_SQUARE = {"w": (2, 2), "b": (2,)}

TIED = {
    "tied": Row(
        plain(_tied, {"w": (2, 2), "out": OUT}), normal(2), alone("w") | affine_blocks("out")
    ),
    "tied_with_bias": Row(
        plain(_tied_with_bias, {"first": _SQUARE, "out": OUT}), normal(2), _PLAIN
    ),
    "tied_transposed": Row(plain(_tied_transposed, {"w": (3, 2)}), normal(3), alone("w")),
    "tied_scale": Row(
        plain(_tied_scale, {"first": _SQUARE, "scale": (2,), "out": OUT}),
        normal(2),
        _PLAIN | alone("scale"),
    ),
}

ROWS = PRODUCTS | CALLS | DERIVED | TIED
