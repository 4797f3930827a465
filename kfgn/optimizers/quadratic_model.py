"""The quadratic model of the objective, with the full Gauss-Newton matrix.

For a step `-e` with `e = sum_i c_i v_i` the model of eq. (32) is

    f(θ - e) - f(θ) ~ -b'c + c'Ac / 2,   b_i = v_i'g,   A_ij = v_i'Gv_j + (τ + η) v_i'v_j,

and its minimum over c costs one linear pass of the model per direction.
With one direction this is eq. (40); with the previous step as a second it is
the momentum of Martens & Grosse (2015), section 7.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.linalg import inner, total
from kfgn.base.types import Array, Named, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.state import Flag


class Direction(NamedTuple):
    """A direction by parameter name, and what it does to the outputs."""

    leaves: Named
    outputs: Float[Array, "N K"]


def push(curvature: Curvature, leaves: Named) -> Direction:
    """The direction with its linear pass through the model."""
    return Direction(leaves, curvature.linearized(leaves))


class Step(NamedTuple):
    """The minimizer of the quadratic model over the span of some directions."""

    coefficients: Float[Array, " directions"]  # c
    predicted: Scalar  # the model's change at the minimum, at most 0
    norm: Scalar  # of the step
    along_previous: Float[Array, "2"]  # v'g and v'Av of the previous step v; 0 where there is none

    @property
    def step_size(self) -> Scalar:
        """α, the coefficient of the first direction."""
        return self.coefficients[0].astype(jnp.float32)

    @property
    def momentum(self) -> Scalar:
        """The coefficient of the previous step, where it is the second direction."""
        second = self.coefficients[1:]
        return second[0].astype(jnp.float32) if len(second) else jnp.zeros((), jnp.float32)

    @property
    def extrapolates(self) -> Flag:
        """Whether the coefficient of the previous step is outside [0, 1]."""
        return jnp.any((self.coefficients[1:] < 0) | (self.coefficients[1:] > 1))


def best_step(
    curvature: Curvature,
    directions: list[Direction],
    damping: Scalar,
    agreement: Scalar | None = None,
) -> Step:
    """The best coefficients of one or two directions, at damping `τ + η`.

    A direction that is zero, or parallel to one before it up to roundoff, gets
    the coefficient 0; where the gradient is zero, all do, and nothing is predicted.
    """
    gradient = curvature.gradient
    slopes, grams, products = [], {}, {}
    for i, u in enumerate(directions):
        slopes.append(inner(u.leaves, {name: gradient[name] for name in u.leaves}))
        for j, v in enumerate(directions[: i + 1]):
            flat = curvature.output_product(u.outputs, v.outputs)
            products[j, i] = inner(u.leaves, v.leaves)
            grams[j, i] = flat + damping.astype(flat.dtype) * products[j, i]
    if len(directions) == 1:
        coefficients = jnp.stack([_over(slopes[0], grams[0, 0])])
    else:
        coefficients = _solve_two(slopes, grams)
        if agreement is not None:
            coefficients = _bounded(coefficients, slopes, grams, agreement)
    c = coefficients
    squared = total((1 + (i != j)) * c[i] * c[j] * x for (i, j), x in products.items())
    curved = total((1 + (i != j)) * c[i] * c[j] * x for (i, j), x in grams.items())
    predicted = 0.5 * curved - jnp.dot(jnp.stack(slopes), c)
    last = len(directions) - 1
    along = jnp.stack([slopes[last], grams[last, last]]) if last else jnp.zeros(2)
    return Step(c, predicted, jnp.sqrt(jnp.maximum(squared, 0)), along.astype(jnp.float32))


def _solve_two(b: list[Scalar], a: dict[tuple[int, int], Scalar]) -> Float[Array, " directions"]:
    # Elimination of the first direction; what is left of the second is zero
    # where it lies in the first's span.
    first, ratio = _over(b[0], a[0, 0]), _over(a[0, 1], a[0, 0])
    left = a[1, 1] - ratio * a[0, 1]
    usable = left > 1e-5 * a[1, 1]
    second = jnp.where(usable, (b[1] - ratio * b[0]) / jnp.where(usable, left, 1), 0)
    return jnp.stack([first - ratio * second, second])


def _bounded(
    c: Float[Array, "2"], b: list[Scalar], a: dict[tuple[int, int], Scalar], agreement: Scalar
) -> Float[Array, "2"]:
    """The best coefficients with the previous step's within its bounds.

    No batch takes more of a step back than there is, and what it would add to the step was for
    the batch before it to say, unless the batches agree that steps are too short.
    """
    second = jnp.maximum(c[1], -1)
    second = jnp.where(agreement > 1, second, jnp.minimum(second, 1))
    first = _over(b[0] - second * a[0, 1], a[0, 0])
    return jnp.where(second == c[1], c, jnp.stack([first, second]))


def _over(a: Scalar, b: Scalar) -> Scalar:
    """`a / b`, and 0 for `0 / 0`: there is no slope along what is zero."""
    nothing = (a == 0) & (b == 0)
    return jnp.where(nothing, 0, a / jnp.where(nothing, 1, b))


def combine(directions: list[Direction], coefficients: Float[Array, " directions"]) -> Named:
    """`sum_i c_i v_i` by parameter name."""
    leaves = [d.leaves for d in directions]
    return jax.tree.map(
        lambda *xs: sum(c.astype(x.dtype) * x for c, x in zip(coefficients, xs, strict=True)),
        *leaves,
    )
