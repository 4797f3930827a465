"""Weights of examples: a weighted batch is one of weighted losses.

With weights w_n of any sign, what is minimized is

    (1/N) sum_n ω_n E_n,   ω_n = N w_n / sum_m |w_m|   or, where the mean is over examples,   w_n.

A weight of 2 counts as its example twice, and one of 0 as if it were not there. The
second moments that must be semi-definite, Kronecker factors and the quadratic model,
have |ω_n|: for a convex loss this is the absolute value of the example's own matrix.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from kfgn.base.devices import AxisName, mean_over_devices
from kfgn.base.linalg import count_of, factor_dtype
from kfgn.base.types import Array, PyTree, Scalar
from kfgn.objective.loss import Columns, Loss, Outputs


class Weighted(NamedTuple):
    """The targets of a weighted batch, or of one example of it."""

    targets: PyTree
    weights: Float[Array, "*N"]  # ω


def weigh(
    inputs: PyTree,
    targets: PyTree,
    weights: Array,
    mean_over: str,
    axis_name: AxisName | None,
    statistics: bool,
) -> tuple[PyTree, Weighted]:
    """The inputs, and the targets with ω; what has weight 0 is replaced by what has not.

    So padding may hold anything, also what makes a model or its derivative NaN. Inputs of
    which a model takes statistics stay what they are.
    """
    given = jax.tree.leaves((inputs, targets, weights))
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in given):
        return jax.eval_shape(
            lambda x, y, w: weigh(x, y, w, mean_over, None, statistics), inputs, targets, weights
        )
    w = as_weights(weights)
    first = jnp.arange(w.size) == jnp.argmax(w != 0)

    def filled(leaf: Any) -> Array:
        x = jnp.asarray(leaf)
        if jnp.issubdtype(x.dtype, jnp.number):  # one sum, where an index would gather all devices'
            one = jnp.sum(_where(first, x, 0), axis=0, dtype=x.dtype)
        else:
            one = x[jnp.argmax(first)]
        return _where(w != 0, x, one)

    if mean_over == "weights":
        w = w / _divisor(mean_over_devices(jnp.mean(jnp.abs(w)), axis_name))
    inputs = inputs if statistics else jax.tree.map(filled, inputs)
    return inputs, Weighted(jax.tree.map(filled, targets), w)


def as_weights(weights: Any) -> Float[Array, " N"]:
    """The weights in JAX's default floating-point type: there may be fewer digits in masks."""
    return jnp.asarray(weights).astype(jnp.result_type(float))


def loss_of(loss: Loss, targets: PyTree, signed: bool = False) -> Loss:
    """The loss for these targets; `signed` keeps the sign of ω in Gauss-Newton matrices."""
    return WeightedLoss(loss, signed) if isinstance(targets, Weighted) else loss


def importance(targets: PyTree, axis_name: AxisName | None = None) -> Float[Array, " N"] | None:
    """`|ω|` over its mean, by which averages over examples are weighed; None for plain ones."""
    if not isinstance(targets, Weighted):
        return None
    size = jnp.abs(targets.weights)
    mean = mean_over_devices(jnp.mean(size), axis_name)
    return jnp.where(mean == 0, 1, size / _divisor(mean))


def rooted(targets: PyTree) -> tuple[PyTree, Float[Array, "*N"] | float]:
    """Targets whose gradients g have `|ω| gg'` as second moments, and the sign of ω."""
    if not isinstance(targets, Weighted):
        return targets, 1.0
    root = jnp.sqrt(jnp.abs(targets.weights))
    return Weighted(targets.targets, root), jnp.sign(targets.weights)


def spread(inputs: PyTree, targets: PyTree, count: int) -> tuple[PyTree, PyTree]:
    """So many examples, spread evenly over those of a batch that count, with its mean of |ω|."""
    every = count_of(inputs) // count
    if not isinstance(targets, Weighted):
        return jax.tree.map(lambda a: a[: every * count : every], (inputs, targets))
    zero = targets.weights == 0
    stride = jnp.maximum(jnp.sum(~zero) // count, 1)
    chosen = jnp.argsort(zero, stable=True)[jnp.arange(count) * stride]
    inputs, (own, weights) = jax.tree.map(lambda a: a[chosen], (inputs, tuple(targets)))
    scale = jnp.mean(jnp.abs(targets.weights)) / _divisor(jnp.mean(jnp.abs(weights)))
    return inputs, Weighted(own, weights * scale)


@dataclasses.dataclass(frozen=True)
class WeightedLoss(Loss):
    """`ω E` of an example with the target `Weighted(y, ω)`; see `Loss` for its methods."""

    loss: Loss
    signed: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.loss.name

    @property
    def convex(self) -> bool:  # type: ignore[override]
        return self.loss.convex

    def _size(self, weights: Array) -> Array:
        return weights if self.signed else jnp.abs(weights)

    def __call__(self, outputs: Outputs, target: Weighted) -> Scalar:
        value = self.loss(_clean(outputs, target), target.targets)
        return _times(target.weights, value.astype(factor_dtype(value.dtype)))

    def second_derivatives(self, outputs: Outputs, target: Weighted) -> Array | None:
        found = self.loss.second_derivatives(_clean(outputs, target), target.targets)
        return None if found is None else _times(target.weights, found)

    def hessian(self, outputs: Outputs, target: Weighted) -> Float[Array, "K K"]:
        return _times(target.weights, self.loss.hessian(_clean(outputs, target), target.targets))

    def gauss_newton_diagonal(self, outputs: Outputs, target: Weighted) -> Array | None:
        found = self.loss.gauss_newton_diagonal(_clean(outputs, target), target.targets)
        return None if found is None else _times(self._size(target.weights), found)

    def gauss_newton_hessian(self, outputs: Outputs, target: Weighted) -> Float[Array, "K K"]:
        found = self.loss.gauss_newton_hessian(_clean(outputs, target), target.targets)
        return _times(self._size(target.weights), found)

    def hessian_sqrt(self, outputs: Outputs, target: Weighted) -> Float[Array, "K R"]:
        root = self.loss.hessian_sqrt(_clean(outputs, target), target.targets)
        return _times(jnp.sqrt(jnp.abs(target.weights)), root)

    def decomposed(self, outputs: Outputs, target: Weighted) -> int:
        cleaned = jax.eval_shape(_clean, outputs, target)
        return self.loss.decomposed(cleaned, target.targets)

    @property
    def can_sample(self) -> bool:
        return self.loss.can_sample

    @property
    def ignores(self) -> bool:
        return self.loss.ignores

    def heeded(self, outputs: Outputs, targets: Weighted) -> Bool[Array, "N K"] | None:
        return self.loss.heeded(outputs, targets.targets)

    def gauss_newton_product(
        self, outputs: Outputs, target: Weighted, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        found = self.loss.gauss_newton_product(_clean(outputs, target), target.targets, vector)
        return _times(self._size(target.weights), found)

    def sample(self, key: Array, outputs: Outputs) -> Any:
        return self.loss.sample(key, outputs)

    def sqrt_columns(self, outputs: Outputs, targets: Weighted) -> tuple[int, Columns]:
        count, column = self.loss.sqrt_columns(jax.vmap(_clean)(outputs, targets), targets.targets)
        root = jnp.sqrt(jnp.abs(targets.weights))
        return count, lambda k: _times(root, column(k))

    def sampled_gradients(
        self, key: Array, outputs: Outputs, targets: Weighted, axis_name: AxisName | None = None
    ) -> Float[Array, "N K"]:
        cleaned = jax.vmap(_clean)(outputs, targets)
        drawn = self.loss.sampled_gradients(key, cleaned, targets.targets, axis_name)
        return _times(jnp.sqrt(jnp.abs(targets.weights)), drawn)

    def gradients(self, outputs: Outputs, targets: Weighted) -> Float[Array, "N K"]:
        found = self.loss.gradients(jax.vmap(_clean)(outputs, targets), targets.targets)
        return _times(targets.weights, found)

    def check_shapes(self, outputs: Outputs, targets: Weighted) -> None:
        self.loss.check_shapes(outputs, targets.targets)

    def check_targets(self, outputs: Outputs, targets: Weighted) -> None:
        counted = np.asarray(targets.weights) != 0
        self.loss.check_targets(outputs, jax.tree.map(lambda y: y[counted], targets.targets))


def _divisor(mean: Scalar) -> Scalar:
    """A mean to divide by: of nothing but zeros, 1."""
    return jnp.where(mean == 0, 1, mean)


def _where(condition: Array, x: Array, other: Any) -> Array:
    """A choice for each example, `[N, ...]`."""
    return jnp.where(condition.reshape(condition.shape + (1,) * (x.ndim - 1)), x, other)


def _clean(outputs: Outputs, target: Weighted) -> Outputs:
    """The outputs of one example, zeros where it does not count: nothing comes back from there."""
    return jax.tree.map(lambda o: jnp.where(target.weights == 0, 0, o), outputs)


def _times(weights: Float[Array, "*N"], x: Array) -> Array:
    """The weights times x, of an example or of all; 0 where a weight is, whatever x is."""
    w = weights.astype(x.dtype).reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    return jnp.where(w == 0, 0, w * x)
