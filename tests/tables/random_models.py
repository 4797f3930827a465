"""Models drawn from a grammar of what users write, in any order, inside of each other.

Each is a function `(params, x, key) -> outputs`, with noise drawn for the whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]  # of one example
Part = Callable[[Any, jax.Array, Any], jax.Array]  # (params, x, key)
ACTIVATIONS = [jnp.tanh, jax.nn.gelu, jax.nn.softplus, jnp.sin, jax.nn.silu]


class Drawn(NamedTuple):
    """A model, and what it was made of."""

    model: Part
    params: dict[str, jax.Array]  # that its outputs depend on
    inputs: jax.Array
    parts: list[str]


class Grammar:
    """Draws the parts of one model."""

    def __init__(self, seed: int) -> None:
        self.choose, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.params: dict[str, jax.Array] = {}
        self.parts: list[str] = []

    def param(self, *shape: int) -> str:
        name = f"p{len(self.params)}"
        values = self.numbers.normal(size=shape) * 0.8 / np.sqrt(shape[-2] if shape[1:] else 1)
        self.params[name] = jnp.asarray(values)
        return name

    def sequence(self, shape: Shape, count: int, depth: int = 0) -> tuple[Part, Shape]:
        parts = []
        for _ in range(count):
            part, shape = self.part(shape, depth)
            parts.append(part)

        def whole(p: Any, x: jax.Array, key: Any) -> jax.Array:
            for part in parts:
                x = part(p, x, key)
            return x

        return whole, shape

    def part(self, shape: Shape, depth: int) -> tuple[Part, Shape]:
        groups = [SIMPLE, ROWS if len(shape) == 2 else {}, AROUND if depth < 2 else {}]
        name = self.choose.choice([name for group in groups for name in group])
        self.parts.append(name)
        if name in AROUND:
            return AROUND[name](self, shape, depth)
        return (SIMPLE | ROWS)[name](self, shape)


def _dense(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    wide = g.choose.randint(2, 4)
    w, b = g.param(shape[-1], wide), g.param(wide)
    return lambda p, x, _: jnp.tanh(x @ p[w] + p[b]), (*shape[:-1], wide)


def _activation(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    act = g.choose.choice(ACTIVATIONS)
    return lambda p, x, _: act(x), shape


def _residual(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    w = g.param(shape[-1], shape[-1])
    return lambda p, x, _: x + jnp.tanh(x @ p[w]), shape


def _gate(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    a, b = (g.param(shape[-1], shape[-1]) for _ in range(2))
    return lambda p, x, _: jax.nn.sigmoid(x @ p[a]) * (x @ p[b]), shape


def _norm(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    scale, bias = g.param(shape[-1]), g.param(shape[-1])

    def part(p: Any, x: jax.Array, _: Any) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 0.1)
        return x * (1 + p[scale]) + p[bias]

    return part, shape


def _bias(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    b = g.param(*shape[-g.choose.randint(1, len(shape)) :])
    return lambda p, x, _: x + p[b], shape


def _tied(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    w = g.param(shape[-1], 3)
    return lambda p, x, _: jnp.tanh(x @ p[w]) @ p[w].T, shape


def _joined(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    w = g.param(shape[-1], 2)
    joined = (*shape[:-1], shape[-1] + 2)
    return lambda p, x, _: jnp.concatenate([x, jnp.sin(x @ p[w])], -1), joined


def _noise(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    k = g.choose.randint(0, 99)

    def part(p: Any, x: jax.Array, key: Any) -> jax.Array:
        return x + 0.3 * jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)

    return part, shape


def _dropout(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    k = g.choose.randint(0, 99)

    def part(p: Any, x: jax.Array, key: Any) -> jax.Array:
        keep = jax.random.bernoulli(jax.random.fold_in(key, k), 0.7, x.shape)
        return jnp.where(keep, x / 0.7, 0)

    return part, shape


def _attention(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    q, k, v = (g.param(shape[-1], shape[-1]) for _ in range(3))

    def part(p: Any, x: jax.Array, _: Any) -> jax.Array:
        scores = (x @ p[q]) @ jnp.swapaxes(x @ p[k], -1, -2)
        return jax.nn.softmax(scores) @ (x @ p[v])

    return part, shape


def _convolution(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    w, names = g.param(2, shape[-1], 3), ("NWC", "WIO", "NWC")
    convolve = jax.lax.conv_general_dilated
    return lambda p, x, _: convolve(x, p[w], (1,), "SAME", dimension_numbers=names), (shape[0], 3)


def _einsum(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    w = g.param(shape[0], shape[1], 2)
    return lambda p, x, _: jnp.einsum("ntd,tdo->nto", x, p[w]), (shape[0], 2)


def _recurrent(g: Grammar, shape: Shape) -> tuple[Part, Shape]:
    u, w = g.param(shape[-1], 3), g.param(3, 3)

    def part(p: Any, x: jax.Array, _: Any) -> jax.Array:
        step = lambda h, v: (jnp.tanh(h @ p[w] + v @ p[u]),) * 2  # noqa: E731
        start = jnp.zeros((x.shape[0], 3), x.dtype)
        return jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    return part, (shape[0], 3)


def _stack(g: Grammar, shape: Shape, depth: int) -> tuple[Part, Shape]:
    """Layers in a loop, by slices or by number, with or without noise, remat, a shared kernel."""
    d, by_number, noise, remat = shape[-1], *(g.choose.random() < 0.5 for _ in range(3))
    w, b, k = g.param(3, d, d), g.param(3, d), g.choose.randint(0, 99)
    shared = g.param(d, d) if g.choose.random() < 0.5 else None

    def layer(p: Any, h: jax.Array, w: jax.Array, b: jax.Array, key: Any) -> jax.Array:
        y = jnp.tanh(h @ w + b + (jnp.tanh(h @ p[shared]) if shared else 0))
        if noise:
            y = jnp.where(jax.random.bernoulli(key, 0.8, y.shape), y, 0)
        return h + y

    def part(p: Any, x: jax.Array, key: Any) -> jax.Array:
        wrap, key = jax.checkpoint if remat else lambda f: f, jax.random.fold_in(key, k)
        if by_number:
            return jax.lax.fori_loop(
                0,
                3,
                wrap(lambda t, h: layer(p, h, p[w][t], p[b][t], jax.random.fold_in(key, t))),
                x,
            )
        step = wrap(lambda h, row: (layer(p, h, *row), None))
        return jax.lax.scan(step, x, (p[w], p[b], jax.random.split(key, 3)))[0]

    return part, shape


def _remat(g: Grammar, shape: Shape, depth: int) -> tuple[Part, Shape]:
    inner, after = g.sequence(shape, 2, depth + 1)
    return jax.checkpoint(inner), after


def _branch(g: Grammar, shape: Shape, depth: int) -> tuple[Part, Shape]:
    inner, after = g.sequence(shape, 1, depth + 1)
    taken = g.choose.random() < 0.5
    if after != shape:
        return inner, after
    return lambda p, x, key: jax.lax.cond(taken, lambda: inner(p, x, key), lambda: x), shape


def _derivative(g: Grammar, shape: Shape, depth: int) -> tuple[Part, Shape]:
    inner, after = g.sequence(shape, 1, depth + 1)

    def part(p: Any, x: jax.Array, key: Any) -> jax.Array:
        value, slope = jax.jvp(lambda x: inner(p, x, key), (x,), (jnp.ones_like(x),))
        return value + slope

    return part, after


SIMPLE = {
    "dense": _dense, "activation": _activation, "residual": _residual, "gate": _gate,
    "norm": _norm, "bias": _bias, "tied": _tied, "joined": _joined, "noise": _noise,
    "dropout": _dropout,
}  # fmt: skip
ROWS: dict[str, Any] = {
    "attention": _attention, "convolution": _convolution, "einsum": _einsum,
    "recurrent": _recurrent,
    "transposed": lambda g, s: (lambda p, x, _: jnp.swapaxes(x, -1, -2), s[::-1]),
    "mean": lambda g, s: (lambda p, x, _: x.mean(1), s[1:]),
    "logsumexp": lambda g, s: (lambda p, x, _: jax.nn.logsumexp(x, axis=1), s[1:]),
}  # fmt: skip
AROUND = {"stack": _stack, "remat": _remat, "branch": _branch, "derivative": _derivative}


def draw(seed: int, examples: int = 4) -> Drawn:
    """A model with some inputs; parameters that its outputs do not depend on are constants."""
    g = Grammar(seed)
    first: Shape = g.choose.choice([(3,), (4,), (3, 2), (4, 3)])
    body, shape = g.sequence(first, g.choose.randint(2, 4))
    w = g.param(shape[-1], 2)
    inputs = jnp.asarray(g.numbers.normal(size=(examples, *first)))

    def model(p: Any, x: jax.Array, key: Any) -> jax.Array:
        whole = g.params | p
        return body(whole, x, key) @ whole[w]

    of = jax.grad(lambda p: jnp.sum(jnp.sin(model(p, inputs, jax.random.key(0)))))(g.params)
    used = {name: x for name, x in g.params.items() if jnp.any(of[name] != 0)}
    return Drawn(model, used, inputs, g.parts)
