"""The losses that are sums over the outputs, whose Hessian is diagonal, with closed forms."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.errors import LossError, OptionError
from kfgn.base.types import Array
from kfgn.objective.draws import drawn
from kfgn.objective.loss import Loss
from kfgn.objective.shapes import require_array, require_shape


class Elementwise(Loss):
    """A sum over the outputs, one array, of `entries(outputs, target)`, with a target for each."""

    def __init__(
        self,
        entries: Callable[[Array, Any], Array],
        name: str,
        sample: Callable[[Array, Array], Any] | None = None,
        heeded: Callable[[Array, Any], Any] | None = None,
    ) -> None:
        super().__init__(lambda o, y: jnp.sum(entries(o, y)), name, True, sample, heeded)
        self.entries = entries

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        raise NotImplementedError  # each has its own

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        require_array(self, outputs)
        require_shape(self, targets, outputs.shape, outputs.shape)


class _HalfSquaredError(Elementwise):
    """`½ sum_k (o_k - y_k)²` of one example, twice as small as optax's `squared_error`.

    The output Hessian is the identity (footnote 5); targets are drawn from N(o, I).

    >>> import jax.numpy as jnp, kfgn
    >>> loss, outputs, target = kfgn.losses.half_squared_error, jnp.array([1.0, 2.0]), jnp.zeros(2)
    >>> float(loss(outputs, target)), loss.hessian(outputs, target).tolist()
    (2.5, [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(self) -> None:
        def entries(outputs: Array, target: Array) -> Array:
            return 0.5 * jnp.square(outputs - target)

        def sample(key: Array, outputs: Array) -> Array:
            return outputs + drawn(jax.random.normal, key, outputs)

        super().__init__(entries, "half_squared_error", sample)

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        return jnp.ones_like(outputs).ravel()


class _SigmoidBinaryCrossEntropy(Elementwise):
    """`sum_k log(1 + exp o_k) - o_k y_k`, optax's loss of that name, summed over the outputs.

    The cross-entropy of Bernoulli outputs given by their logits o; targets in [0, 1].
    A logit of -inf is certain of 0, and one of +inf of 1.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, logits, target = kfgn.losses.sigmoid_binary_cross_entropy, jnp.zeros(2), jnp.ones(2)
    >>> loss.hessian(logits, target).tolist()
    [[0.25, 0.0], [0.0, 0.25]]
    """

    def __init__(self) -> None:
        def entries(outputs: Array, target: Array) -> Array:
            infinite = jnp.isinf(outputs)
            o = jnp.where(infinite, 0, outputs)
            certain = target == (outputs > 0).astype(target.dtype)  # 0 log 0 = 0
            finite = jax.nn.softplus(o) - o * target
            return jnp.where(infinite, jnp.where(certain, 0, jnp.inf), finite)

        def sample(key: Array, outputs: Array) -> Array:
            return (drawn(jax.random.uniform, key, outputs) < jax.nn.sigmoid(outputs)).astype(
                outputs.dtype
            )

        super().__init__(entries, "sigmoid_binary_cross_entropy", sample)

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


class _PoissonNegativeLogLikelihood(Elementwise):
    """`sum_k exp(o_k) - o_k y_k`, of counts y with the rates exp(o), without `log y!`.

    The output Hessian is `diag(exp o)`, and does not depend on the counts.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, count = kfgn.losses.poisson_negative_log_likelihood, jnp.array([3.0])
    >>> float(loss(jnp.zeros(1), count)), loss.hessian(jnp.zeros(1), count).tolist()
    (1.0, [[1.0]])
    """

    def __init__(self) -> None:
        def entries(outputs: Array, target: Array) -> Array:
            never = (outputs == -jnp.inf) & (target == 0)  # a rate of 0
            return jnp.exp(outputs) - jnp.where(never, 0, outputs) * target

        def sample(key: Array, outputs: Array) -> Array:
            return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)

        super().__init__(entries, "poisson_negative_log_likelihood", sample)

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        return jnp.exp(outputs).ravel()

    def check_targets(self, outputs: Array, targets: Any) -> None:
        if bool(jnp.any(targets < 0)):
            raise LossError(
                f"{self.name}: targets are counts and must not be negative, found "
                f"{float(jnp.min(targets)):g}"
            )


class _Huber(Elementwise):
    def __init__(self, delta: float) -> None:
        def entries(outputs: Array, target: Array) -> Array:
            error = outputs - target
            inside = jnp.clip(error, -delta, delta)
            return inside * (error - 0.5 * inside)

        super().__init__(entries, f"huber({delta:g})")
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
    _check_width("delta", delta)
    return _Huber(delta)


def _check_width(name: str, value: Any) -> None:
    if not (isinstance(value, int | float) and value > 0):
        raise OptionError(f"{name} must be a positive number, found {value!r}")


class _Quantile(Elementwise):
    def __init__(self, levels: np.ndarray, width: float) -> None:
        def entries(outputs: Array, target: Array) -> Array:
            error, q = target - outputs, levels.astype(outputs.dtype)
            slope = jnp.clip(error / width, q - 1, q)
            return slope * (error - 0.5 * width * slope)

        super().__init__(entries, f"quantile({levels.tolist()}, {width:g})")
        self.levels, self.width = levels, width

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        slope, q = (target - outputs) / self.width, self.levels.astype(outputs.dtype)
        inside = (slope >= q - 1) & (slope <= q)
        return (inside.astype(outputs.dtype) / self.width).ravel()

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        super().check_shapes(outputs, targets)
        if self.levels.ndim and (not outputs.shape or outputs.shape[-1] != self.levels.size):
            raise LossError(
                f"{self.name}: expected an output for each of the {self.levels.size} levels, "
                f"along the last axis, found outputs of shape {outputs.shape}"
            )


def quantile(level: float | Sequence[float], width: float = 0.1) -> Loss:
    """`sum_k q r_k` where `r_k > 0`, else `(q - 1) r_k`, of `r = y - o`, rounded at 0.

    The pinball loss, whose minimum is the quantile of level q, has no curvature. Where
    `(q - 1) w <= r_k <= q w` a parabola of second derivative `1 / w` joins both lines
    (its Moreau envelope), and the output Hessian is 0 elsewhere.

    Args:
      level: q between 0 and 1; or several, one for each output along the last axis.
      width: w, in the targets' units.

    Returns:
      The loss.

    Raises:
      OptionError: a level that is not between 0 and 1, or a width that is not positive.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, target = kfgn.losses.quantile([0.1, 0.9], width=0.2), jnp.array([1.0, 1.0])
    >>> round(float(loss(jnp.zeros(2), target)), 6)  # 0.1 + 0.9 - 0.1 (0.01 + 0.81)
    0.918
    """
    levels = np.asarray(level, float)
    if levels.ndim > 1 or not np.all((levels > 0) & (levels < 1)):
        raise OptionError(f"level must be between 0 and 1, or several such, found {level!r}")
    _check_width("width", width)
    return _Quantile(levels, width)


half_squared_error = _HalfSquaredError()
poisson_negative_log_likelihood = _PoissonNegativeLogLikelihood()
sigmoid_binary_cross_entropy = _SigmoidBinaryCrossEntropy()
