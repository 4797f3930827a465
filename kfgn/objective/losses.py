"""The losses with closed forms: squared error, sigmoid and softmax cross-entropy.

Each sums over the outputs of an example and overrides the generic rules of
`kfgn.losses.Loss` with its own output Hessian, square root and sampling.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.errors import LossError
from kfgn.base.types import Array, Scalar
from kfgn.objective.loss import Columns, Loss, Outputs, flatten_batch, from_function

__all__ = [
    "Loss",
    "from_function",
    "half_squared_error",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]


class _Elementwise(Loss):
    """A sum over the outputs, one array, with a target for each: the output Hessian is diagonal."""

    def second_derivatives(self, outputs: Array) -> Array:
        """Of each output's own loss, in the shape of the outputs; they depend on no target."""
        raise NotImplementedError

    def hessian(self, outputs: Array, target: Any) -> Float[Array, "K K"]:
        return jnp.diag(self.second_derivatives(outputs).ravel())

    def hessian_sqrt(self, outputs: Array, target: Any) -> Float[Array, "K K"]:
        return jnp.diag(jnp.sqrt(self.second_derivatives(outputs)).ravel())

    def gauss_newton_product(
        self, outputs: Array, target: Any, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        return self.second_derivatives(outputs).ravel() * vector

    def mean_hessian(self, outputs: Array, targets: Any) -> Float[Array, "K K"]:
        return jnp.diag(jnp.mean(self.second_derivatives(flatten_batch(outputs)), axis=0))

    def sqrt_columns(self, outputs: Array, targets: Any) -> tuple[int, Columns]:
        roots = jnp.sqrt(self.second_derivatives(flatten_batch(outputs)))
        size = roots.shape[1]
        return size, lambda k: roots * jax.nn.one_hot(k, size, dtype=roots.dtype)

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        _require_array(self, outputs)
        _require_shape(self, targets, outputs.shape, outputs.shape)


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

    def second_derivatives(self, outputs: Array) -> Array:
        return jnp.ones_like(outputs)


class _SigmoidBinaryCrossEntropy(_Elementwise):
    """`sum_k log(1 + exp o_k) - o_k y_k`, optax's loss of that name, summed over the outputs.

    The cross-entropy of Bernoulli outputs given by their logits o; targets in [0, 1].

    >>> import jax.numpy as jnp, kfgn
    >>> loss, logits, target = kfgn.losses.sigmoid_binary_cross_entropy, jnp.zeros(2), jnp.ones(2)
    >>> loss.hessian(logits, target).tolist(), float(loss.correct(logits + 1, target))
    ([[0.25, 0.0], [0.0, 0.25]], 1.0)
    """

    def __init__(self) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            return jnp.sum(jax.nn.softplus(outputs) - outputs * target)

        def sample(key: Array, outputs: Array) -> Array:
            return jax.random.bernoulli(key, jax.nn.sigmoid(outputs)).astype(outputs.dtype)

        def correct(outputs: Array, target: Array) -> Scalar:
            return jnp.mean((outputs > 0) == (target > 0.5))

        super().__init__(value, "sigmoid_binary_cross_entropy", True, sample, correct)

    def second_derivatives(self, outputs: Array) -> Array:
        # sigmoid(o) sigmoid(-o), without the cancellation of p (1 - p) at p near 1.
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)

    def check_targets(self, outputs: Array, targets: Any) -> None:
        if bool(jnp.any((targets < 0) | (targets > 1))):
            low, high = float(jnp.min(targets)), float(jnp.max(targets))
            raise LossError(
                f"{self.name}: targets are probabilities and must lie in [0, 1], found values "
                f"from {low:g} to {high:g}; rescale them (gray levels: divide by 255)."
            )


class _SoftmaxCrossEntropy(Loss):
    """`-sum_k y_k log softmax(o)_k`, optax's losses of these names, summed over positions if any.

    The cross-entropy of a categorical output given by its logits o on the last axis;
    a target is a distribution y over the classes, or the index of the one class.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, logits = kfgn.losses.softmax_cross_entropy, jnp.zeros(2)
    >>> loss.hessian(logits, jnp.array([0.0, 1.0])).tolist()
    [[0.25, -0.25], [-0.25, 0.25]]
    >>> loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    >>> float(loss.correct(logits.at[1].set(1.0), 1))
    1.0
    """

    def __init__(self, name: str, integer_labels: bool) -> None:
        def value(outputs: Array, target: Array) -> Scalar:
            log_p = jax.nn.log_softmax(outputs)
            if integer_labels:
                return -jnp.sum(jnp.take_along_axis(log_p, target[..., None], axis=-1))
            return -jnp.sum(target * log_p)

        def sample(key: Array, outputs: Array) -> Array:
            labels = jax.random.categorical(key, outputs)
            if integer_labels:
                return labels
            return jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)

        def correct(outputs: Array, target: Array) -> Scalar:
            labels = target if integer_labels else jnp.argmax(target, axis=-1)
            return jnp.mean(jnp.argmax(outputs, axis=-1) == labels)

        super().__init__(value, name, True, sample, correct)
        self.integer_labels = integer_labels

    def hessian(self, outputs: Array, target: Any) -> Float[Array, "K K"]:
        p = jax.nn.softmax(outputs)
        blocks = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(_rows(p))
        return jax.scipy.linalg.block_diag(*blocks)

    def hessian_sqrt(self, outputs: Array, target: Any) -> Float[Array, "K R"]:
        p = _rows(jax.nn.softmax(outputs))
        columns = jnp.arange(p.shape[-1] - 1)
        roots = jax.vmap(lambda q: jax.vmap(lambda k: _cholesky_column(q, k))(columns).T)(p)
        return jax.scipy.linalg.block_diag(*roots)

    def gauss_newton_product(
        self, outputs: Array, target: Any, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        p = _rows(jax.nn.softmax(outputs))
        v = vector.reshape(p.shape)
        return (p * (v - jnp.sum(p * v, axis=-1, keepdims=True))).ravel()

    def mean_hessian(self, outputs: Array, targets: Any) -> Float[Array, "K K"]:
        # diag(mean p) - P'P / N on each block: no matrix per example.
        p = jax.nn.softmax(outputs)
        count, classes = p.shape[0], p.shape[-1]
        p = p.reshape(count, -1, classes).swapaxes(0, 1)
        second = jnp.einsum("tni,tnj->tij", p, p, precision="highest") / count
        blocks = jax.vmap(jnp.diag)(jnp.mean(p, axis=1)) - second
        return jax.scipy.linalg.block_diag(*blocks)

    def sqrt_columns(self, outputs: Array, targets: Any) -> tuple[int, Columns]:
        p = jax.nn.softmax(outputs)
        count, classes = p.shape[0], p.shape[-1]
        p = p.reshape(count, -1, classes)
        positions = p.shape[1]

        # One class less than there are: the Hessian of a position is singular.
        rank = classes - 1

        def column(k: Array) -> Float[Array, "N K"]:
            position, index = k // rank, k % rank
            here = jax.nn.one_hot(position, positions, dtype=p.dtype)
            column = _cholesky_column(jnp.take(p, position, axis=1), index)
            return (here[None, :, None] * column[:, None, :]).reshape(count, -1)

        return positions * rank, column

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        _require_array(self, outputs)
        if outputs.ndim == 0:
            raise LossError(f"{self.name}: outputs need an axis of classes, found a scalar")
        if self.integer_labels:
            _require_shape(self, targets, outputs.shape[:-1], outputs.shape)
            if not jnp.issubdtype(targets.dtype, jnp.integer):
                raise LossError(
                    f"{self.name}: targets must be integer class indices, found dtype "
                    f"{targets.dtype}; for distributions use softmax_cross_entropy."
                )
        else:
            _require_shape(self, targets, outputs.shape, outputs.shape)

    def check_targets(self, outputs: Array, targets: Any) -> None:
        classes = outputs.shape[-1]
        if self.integer_labels:
            if bool(jnp.any((targets < 0) | (targets >= classes))):
                raise LossError(
                    f"{self.name}: targets must be class indices in [0, {classes - 1}], found "
                    f"{int(jnp.min(targets))} to {int(jnp.max(targets))}; check the number of "
                    "outputs of the model."
                )
            return
        total = jnp.sum(targets, axis=-1)
        if bool(jnp.any(targets < 0)) or bool(jnp.any(jnp.abs(total - 1) > 1e-2)):
            raise LossError(
                f"{self.name}: each target must be a distribution over the {classes} classes "
                f"(non-negative, sum 1), found sums from {float(jnp.min(total)):g} to "
                f"{float(jnp.max(total)):g}; use one-hot vectors, or "
                "softmax_cross_entropy_with_integer_labels for indices."
            )


def _cholesky_column(p: Float[Array, "*S K"], k: Array) -> Float[Array, "*S K"]:
    """Column k of the Cholesky factor of `diag(p) - pp'`, k below K - 1.

    In closed form: with the tail sums `t_k = sum_{i>k} p_i`, entry k is
    `sqrt(p_k t_k / t_{k-1})`, and entry i > k is `-p_i sqrt(p_k / (t_{k-1} t_k))`.
    """
    tail = jnp.cumsum(p[..., ::-1], axis=-1)[..., ::-1]  # from k on, k included
    p_k = jnp.take(p, k, axis=-1)[..., None]
    before, after = jnp.take(tail, k, axis=-1)[..., None], jnp.take(tail, k + 1, axis=-1)[..., None]
    tiny = jnp.finfo(p.dtype).tiny
    ratio = jnp.sqrt(p_k / jnp.maximum(before, tiny))
    index = jnp.arange(p.shape[-1])
    below = -p * ratio / jnp.sqrt(jnp.maximum(after, tiny))
    return jnp.where(index == k, ratio * jnp.sqrt(after), jnp.where(index > k, below, 0))


def _rows(p: Array) -> Float[Array, "T K"]:
    return p.reshape(-1, p.shape[-1])


def _require_array(loss: Loss, outputs: Outputs) -> None:
    if not hasattr(outputs, "shape"):
        raise LossError(
            f"{loss.name} takes a single array of outputs, found a "
            f"{type(outputs).__name__}; use kfgn.losses.from_function for several outputs."
        )


def _require_shape(loss: Loss, targets: Any, expected: tuple, outputs: tuple) -> None:
    found = getattr(targets, "shape", None)
    if found != expected:
        raise LossError(
            f"{loss.name}: an example has outputs of shape {outputs}, so its target must have "
            f"shape {expected}, found {found}; check the model's last layer and the targets."
        )


half_squared_error = _HalfSquaredError()
sigmoid_binary_cross_entropy = _SigmoidBinaryCrossEntropy()
softmax_cross_entropy = _SoftmaxCrossEntropy("softmax_cross_entropy", integer_labels=False)
softmax_cross_entropy_with_integer_labels = _SoftmaxCrossEntropy(
    "softmax_cross_entropy_with_integer_labels", integer_labels=True
)
