"""The quadratic model of the objective, with the full Gauss-Newton matrix.

For a step `-e` with `e = sum_i c_i v_i` the model of eq. (32) is

    f(θ - e) - f(θ) ~ -b'c + c'Ac / 2,   b_i = v_i'g,   A_ij = v_i'Gv_j + (τ + η) v_i'v_j,

and its minimum over c costs one linear pass of the model per direction.
With one direction this is eq. (40); with the previous step as a second it is
the momentum of Martens & Grosse (2015), section 7.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfgn.base.linalg import inner
from kfgn.base.types import Array, Named
from kfgn.curvature.batch import Curvature


class Direction(NamedTuple):
    """A direction by parameter name, and what it does to the outputs, `[N, K]`."""

    leaves: Named
    outputs: Array


def push(curvature: Curvature, leaves: Named) -> Direction:
    """The direction with its linear pass through the model."""
    return Direction(leaves, curvature.linearized(leaves))


class Step(NamedTuple):
    """The minimizer of the quadratic model over the span of some directions."""

    coefficients: Array  # c, one per direction
    predicted: Array  # the model's change at the minimum, at most 0

    @property
    def extrapolates(self) -> Array:
        """Whether the coefficient of the previous step, if there is one, is outside [0, 1]."""
        if len(self.coefficients) == 1:
            return jnp.array(False)
        return (self.coefficients[1] < 0) | (self.coefficients[1] > 1)


def best_step(curvature: Curvature, directions: list[Direction], damping: Array) -> Step:
    """The best coefficients of one or two directions, at damping `τ + η`.

    A second direction that is zero, or parallel to the first up to roundoff,
    gets the coefficient 0.
    """
    gradient = curvature.gradient
    slopes, grams = [], {}
    for i, u in enumerate(directions):
        slopes.append(inner(u.leaves, {name: gradient[name] for name in u.leaves}))
        for j, v in enumerate(directions[: i + 1]):
            flat = curvature.output_product(u.outputs, v.outputs)
            grams[j, i] = flat + damping.astype(flat.dtype) * inner(u.leaves, v.leaves)
    if len(directions) == 1:
        coefficients = jnp.stack([slopes[0] / grams[0, 0]])
    else:
        coefficients = _solve_two(slopes, grams)
    return Step(coefficients, -0.5 * jnp.dot(jnp.stack(slopes), coefficients))


def _solve_two(b: list[Array], a: dict[tuple[int, int], Array]) -> Array:
    # Elimination of the first direction; what is left of the second is zero
    # where it lies in the first's span.
    first = b[0] / a[0, 0]
    ratio = a[0, 1] / a[0, 0]
    left = a[1, 1] - ratio * a[0, 1]
    usable = left > 1e-5 * a[1, 1]
    second = jnp.where(usable, (b[1] - ratio * b[0]) / jnp.where(usable, left, 1), 0)
    return jnp.stack([first - ratio * second, second])


def combine(directions: list[Direction], coefficients: Array) -> Named:
    """`sum_i c_i v_i` by parameter name."""
    leaves = [d.leaves for d in directions]
    return jax.tree.map(
        lambda *xs: sum(c.astype(x.dtype) * x for c, x in zip(coefficients, xs, strict=True)),
        *leaves,
    )
