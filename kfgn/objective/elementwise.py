"""The losses that are sums over the outputs, whose Hessian is diagonal, with closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.errors import LossError, OptionError
from kfgn.base.types import Array, Scalar
from kfgn.objective.loss import Loss, require_array, require_shape


class _Elementwise(Loss):
    """A sum over the outputs, one array, with a target for each."""

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        require_array(self, outputs)
        require_shape(self, targets, outputs.shape, outputs.shape)


class _HalfSquaredError(_Elementwise):
    """`½ sum_k (o_k - y_k)²` of one example, twice as small as optax's `squared_error`.

    The output Hessian is the identity (footnote 5); targets are drawn from N(o, I).

    >>> import jax.numpy as jnp, kfgn
    >>> loss, outputs, target = kfgn.losses.half_squared_error, jnp.array([1.0, 2.0]), jnp.zeros(2)
    >>> float(loss(outputs, target)), loss.hessian(outputs, target).tolist()
    (2.5, [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(self) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            return 0.5 * jnp.sum(jnp.square(outputs - target))

        def sample(key: Array, outputs: Array) -> Array:
            return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)

        super().__init__(value, "half_squared_error", True, sample)

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        return jnp.ones_like(outputs).ravel()


class _SigmoidBinaryCrossEntropy(_Elementwise):
    """`sum_k log(1 + exp o_k) - o_k y_k`, optax's loss of that name, summed over the outputs.

    The cross-entropy of Bernoulli outputs given by their logits o; targets in [0, 1].
    A logit of -inf is certain of 0, and one of +inf of 1.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, logits, target = kfgn.losses.sigmoid_binary_cross_entropy, jnp.zeros(2), jnp.ones(2)
    >>> loss.hessian(logits, target).tolist()
    [[0.25, 0.0], [0.0, 0.25]]
    """

    def __init__(self) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            infinite = jnp.isinf(outputs)
            o = jnp.where(infinite, 0, outputs)
            certain = target == (outputs > 0).astype(target.dtype)  # 0 log 0 = 0
            finite = jax.nn.softplus(o) - o * target
            return jnp.sum(jnp.where(infinite, jnp.where(certain, 0, jnp.inf), finite))

        def sample(key: Array, outputs: Array) -> Array:
            return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)

        super().__init__(value, "sigmoid_binary_cross_entropy", True, sample)

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        # sigmoid(o) sigmoid(-o), without the cancellation of p (1 - p) at p near 1.
        return (jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)).ravel()

    def check_targets(self, outputs: Array, targets: Any) -> None:
        if bool(jnp.any((targets < 0) | (targets > 1))):
            low, high = float(jnp.min(targets)), float(jnp.max(targets))
            raise LossError(
                f"{self.name}: targets are probabilities and must lie in [0, 1], found values "
                f"from {low:g} to {high:g}; rescale them (gray levels: divide by 255)."
            )


class _PoissonNegativeLogLikelihood(_Elementwise):
    """`sum_k exp(o_k) - o_k y_k`, of counts y with the rates exp(o), without `log y!`.

    The output Hessian is `diag(exp o)`, and does not depend on the counts.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, count = kfgn.losses.poisson_negative_log_likelihood, jnp.array([3.0])
    >>> float(loss(jnp.zeros(1), count)), loss.hessian(jnp.zeros(1), count).tolist()
    (1.0, [[1.0]])
    """

    def __init__(self) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            never = (outputs == -jnp.inf) & (target == 0)  # a rate of 0
            return jnp.sum(jnp.exp(outputs) - jnp.where(never, 0, outputs) * target)

        def sample(key: Array, outputs: Array) -> Array:
            return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)

        super().__init__(value, "poisson_negative_log_likelihood", True, sample)

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        return jnp.exp(outputs).ravel()

    def check_targets(self, outputs: Array, targets: Any) -> None:
        if bool(jnp.any(targets < 0)):
            raise LossError(
                f"{self.name}: targets are counts and must not be negative, found "
                f"{float(jnp.min(targets)):g}"
            )


class _Huber(_Elementwise):
    def __init__(self, delta: float) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            error = outputs - target
            inside = jnp.clip(error, -delta, delta)
            return jnp.sum(inside * (error - 0.5 * inside))

        super().__init__(value, f"huber({delta:g})", True)
        self.delta = delta

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        return (jnp.abs(outputs - target) <= self.delta).astype(outputs.dtype).ravel()


def huber(delta: float = 1.0) -> Loss:
    """`sum_k ½ r_k²` where `|r_k| <= δ`, else `δ (|r_k| - ½ δ)`, of errors r = o - y.

    Optax's `huber_loss`, summed over the outputs. The output Hessian is diagonal: 1
    where `|r_k| <= δ` and 0 elsewhere.

    Args:
      delta: δ, where the parabola becomes a line.

    Returns:
      The loss.

    Raises:
      OptionError: delta is not positive.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, outputs = kfgn.losses.huber(1.0), jnp.array([0.5, 3.0])
    >>> float(loss(outputs, jnp.zeros(2))), loss.hessian(outputs, jnp.zeros(2)).tolist()
    (2.625, [[1.0, 0.0], [0.0, 0.0]])
    """
    if not (isinstance(delta, int | float) and delta > 0):
        raise OptionError(f"delta must be a positive number, found {delta!r}")
    return _Huber(delta)


half_squared_error = _HalfSquaredError()
poisson_negative_log_likelihood = _PoissonNegativeLogLikelihood()
sigmoid_binary_cross_entropy = _SigmoidBinaryCrossEntropy()
