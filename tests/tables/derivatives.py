"""Rows of the table of architectures: derivatives by the inputs inside, as residuals have them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import jet

from tests.tables.rows import Row, affine, affine_blocks, alone, normal, plain

_NET: dict[str, Any] = {"first": {"w": (2, 3), "b": (3,)}, "out": {"w": (3, 1), "b": (1,)}}
_HEADLESS = {"first": {"w": (2, 3), "b": (3,)}, "out": {"w": (3,), "b": ()}}
_STACKED = _NET | {"first": {"w": (2, 2), "b": (2,)}, "hidden": {"w": (2, 2, 2), "b": (2, 2)},
                   "out": {"w": (2, 1), "b": (1,)}}  # fmt: skip


def _scalar(p, x):
    return affine(p["out"], jnp.tanh(affine(p["first"], x)))[0]


def _interior_and_boundary(p, inputs):
    """A Laplacian by `jax.hessian`, and the value at another point."""

    def one(x, y):
        return jnp.stack([jnp.trace(jax.hessian(_scalar, 1)(p, x)), _scalar(p, y)])

    return jax.vmap(one)(*inputs)


def _heat(p, x):
    """`u_t - ν u_ss`, the second derivative by Taylor mode, for all points at once."""

    def u(x):
        return affine(p["out"], jnp.sin(affine(p["first"], x)))

    along, by_time = jnp.zeros_like(x).at[:, 0].set(1), jnp.zeros_like(x).at[:, 1].set(1)
    _, (_, second) = jet.jet(u, (x,), ((along, jnp.zeros_like(x)),))
    value, rate = jax.jvp(u, (x,), (by_time,))
    return jnp.concatenate([rate - p["viscosity"] * second, value], axis=1)


def _burgers(p, x):
    """`u_t + u u_s` by gradients of a kernel without an axis of outputs."""

    def one(x):
        def u(x):
            return jnp.dot(jnp.sin(affine(p["first"], x)), p["out"]["w"]) + p["out"]["b"]

        value, (by_time, along) = jax.value_and_grad(u)(x)
        return jnp.stack([by_time + value * along, along])

    return jax.vmap(one)(x)


def _stacked(p, x):
    """Layers in a loop, with `jax.jvp` of `jax.grad`, and the value."""

    def u(x):
        h = jnp.tanh(affine(p["first"], x))
        h, _ = jax.lax.scan(lambda h, layer: (jnp.sin(affine(layer, h)), None), h, p["hidden"])
        return affine(p["out"], h)[0]

    def one(x):
        direction = jnp.zeros_like(x).at[0].set(1)
        gradient, second = jax.jvp(jax.grad(u), (x,), (direction,))
        return jnp.stack([second @ direction, u(x) * gradient[1]])

    return jax.vmap(one)(x)


def _two_points(rng, count):
    return normal(2)(rng, count), normal(2)(rng, count)


_BLOCKS = affine_blocks("first", "out")

ROWS = {
    "laplacian_and_boundary": Row(plain(_interior_and_boundary, _NET), _two_points, _BLOCKS),
    "heat_by_jet": Row(
        plain(_heat, _NET | {"viscosity": ()}), normal(2), _BLOCKS | alone("viscosity")
    ),
    "burgers_by_grad": Row(plain(_burgers, _HEADLESS), normal(2), _BLOCKS),
    "stacked_jvp_of_grad": Row(
        plain(_stacked, _STACKED), normal(2), affine_blocks("first", "hidden", "out")
    ),
}
