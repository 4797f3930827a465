"""The curvature of several micro-batches as one, for gradients that are accumulated."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.devices import AxisName
from kfgn.base.errors import OptionError
from kfgn.base.linalg import total
from kfgn.base.types import Array, Scalar
from kfgn.curvature.batch import Curvature


def average_curvature(curvatures: Sequence[Curvature]) -> Curvature:
    """The mean of the curvatures of micro-batches at the same params, by examples or weights.

    Value, gradient, quadratic model and objective are those of the whole
    batch; so are the factors of "kflr", "kfac" and "empirical". Those of
    "kfra" are the mean of what each micro-batch's own recursion gives. The
    gradients that go with it need the same weights, as `curvature.gradient` has.

        curvatures.append(curvature)              # for each micro-batch
        optimizer.update(mean_grads, state, params, curvature=kfgn.average_curvature(curvatures))

    Raises:
      OptionError: there is nothing to average, or not only curvatures, or they
        were made with different settings.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> _, curvature = kfgn.value_grad_and_curvature(objective)(params, batch)
    >>> bool(kfgn.average_curvature([curvature, curvature]).value == curvature.value)
    True
    """
    curvatures = list(curvatures)
    if not curvatures or not all(isinstance(c, Curvature) for c in curvatures):
        found = ", ".join(type(c).__name__ for c in curvatures) or "nothing"
        raise OptionError(f"expected one kfgn.Curvature or more to average, found {found}")
    first = curvatures[0].settings
    for other in curvatures[1:]:
        first.require_equal(other.settings, "curvatures of one average")

    examples = total(c.examples for c in curvatures)
    weights = [c.examples / jnp.where(examples == 0, 1, examples) for c in curvatures]
    known = [(c.factors, c.value, c.gradient) for c in curvatures]
    factors, value, gradient = jax.tree.map(lambda *x: _weighted(weights, x), *known)
    rows = tuple(jax.eval_shape(c.linearized, c.gradient).shape[0] for c in curvatures)
    products = [c.output_product for c in curvatures]
    of_first: Any = products[0].func
    axis = of_first.axis_name
    return Curvature(
        factors=factors,
        value=value,
        gradient=gradient,
        linearized=Partial(_concatenated, [c.linearized for c in curvatures]),
        output_product=Partial(_MeanProduct(rows, axis), weights, products),
        displaced=Partial(_mean_value, weights, [c.displaced for c in curvatures]),
        examples=examples,
        settings=first,
    )


def _concatenated(parts: list[Partial], direction: dict[str, Array]) -> Float[Array, "n K"]:
    """The outputs' changes of all micro-batches, one after another."""
    return jnp.concatenate([part(direction) for part in parts])


@dataclasses.dataclass(frozen=True)
class _MeanProduct:
    rows: tuple[int, ...]  # of each micro-batch
    axis_name: AxisName | None  # of devices

    def __call__(
        self,
        weights: list[Scalar],
        parts: list[Partial],
        u: Float[Array, "n K"],
        v: Float[Array, "n K"],
    ) -> Scalar:
        ends = list(itertools.accumulate(self.rows))[:-1]
        pairs = zip(parts, jnp.split(u, ends), jnp.split(v, ends), strict=True)
        return _weighted(weights, [part(a, b) for part, a, b in pairs])


def _mean_value(weights: list[Scalar], parts: list[Partial], direction: dict[str, Array]) -> Scalar:
    return _weighted(weights, [part(direction) for part in parts])


def _weighted(weights: list[Scalar], values: Sequence[Array]) -> Array:
    """The sum of the values times their weights."""
    return total(w.astype(x.dtype) * x for w, x in zip(weights, values, strict=True))
