"""The cross-entropies of categorical outputs, of soft targets and of labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kfgn.base.devices import AxisName, split_over_devices
from kfgn.base.errors import LossError, OptionError
from kfgn.base.linalg import precision
from kfgn.base.types import Array, Scalar
from kfgn.objective.draws import drawn_class
from kfgn.objective.loss import Columns, Loss
from kfgn.objective.shapes import require_array, require_shape


class _SoftmaxCrossEntropy(Loss):
    """`-sum_k y_k log softmax(o)_k`, optax's losses of these names, summed over positions if any.

    The cross-entropy of a categorical output given by its logits o on the last axis;
    a target is a distribution y over the classes, or the index of the one class. A
    logit of -inf masks a class: where its target is 0, it counts for nothing. A label
    that is no class makes the value, gradient and curvature NaN.

    With q the masses of the classes (y, and what `with_options` makes of it),
    p = softmax(o) and s = sum_k q_k: the gradient is `s p - q`, and the output
    Hessian `s (diag(p) - pp')`.

    >>> import jax.numpy as jnp, kfgn
    >>> loss, logits = kfgn.losses.softmax_cross_entropy, jnp.zeros(2)
    >>> loss.hessian(logits, jnp.array([0.0, 1.0])).tolist()
    [[0.25, -0.25], [-0.25, 0.25]]
    """

    def __init__(
        self,
        name: str,
        integer_labels: bool,
        ignore_index: int | None = None,
        class_weights: np.ndarray | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        heeded = None if ignore_index is None else self._not_ignored
        super().__init__(self._value, name, True, self._sample_of, heeded)
        self.integer_labels = integer_labels
        self.ignore_index = ignore_index
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def with_options(
        self,
        *,
        ignore_index: int | None = None,
        class_weights: Any = None,
        label_smoothing: float | None = None,
    ) -> "_SoftmaxCrossEntropy":
        """The same loss with some of torch's options; None leaves one as it is.

        The masses of the classes become `q_k = w_k ((1 - α) y_k + α/K)`, and zero at
        labels that are ignored, which then add nothing to the value, gradient and
        curvature. The objective stays the mean over all examples, ignored ones too.

        Args:
          ignore_index: the label that counts for nothing, such as -100 or a class;
            of an example, or of some positions of it.
          class_weights: w, `[K]`.
          label_smoothing: α, from 0 to 1.

        Returns:
          The loss.

        Raises:
          OptionError: an option has a wrong value.

        >>> import jax.numpy as jnp, kfgn
        >>> loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
        >>> loss = loss.with_options(ignore_index=-100)
        >>> float(loss(jnp.zeros((3, 2)), jnp.array([0, -100, -100]))) == float(jnp.log(2))
        True
        """
        index = self.ignore_index if ignore_index is None else ignore_index
        weights = self.class_weights if class_weights is None else np.asarray(class_weights)
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        if index is not None and not (self.integer_labels and isinstance(index, int | np.integer)):
            raise OptionError(
                f"ignore_index must be an integer, found {index!r}, of "
                "softmax_cross_entropy_with_integer_labels"
            )
        if weights is not None and not (
            weights.ndim == 1 and np.all(weights >= 0) and np.all(np.isfinite(weights))
        ):
            raise OptionError(
                "class_weights must be one non-negative number for each class, found "
                f"{class_weights!r}"
            )
        if not 0 <= smoothing <= 1:
            raise OptionError(f"label_smoothing must lie in [0, 1], found {smoothing!r}")
        told = [
            f"{k}={v}"
            for k, v in (("ignore_index", index), ("class_weights", weights))
            if v is not None
        ]
        told += [f"label_smoothing={smoothing}"] if smoothing else []
        name = f"{self.name.partition('.')[0]}.with_options({', '.join(told)})"
        return _SoftmaxCrossEntropy(name, self.integer_labels, index, weights, smoothing)

    def _read(self, outputs: Array, target: Any) -> tuple[Array, Array]:
        """The logits, and the masses q in their shape; zeros at what is ignored."""
        classes, target = outputs.shape[-1], jnp.asarray(target)
        if self.integer_labels:
            labels = _wide(target)
            y = jax.nn.one_hot(labels, classes, dtype=outputs.dtype)
        else:
            floating = jnp.issubdtype(target.dtype, jnp.floating)
            y = target if floating else target.astype(outputs.dtype)
        if self.label_smoothing:
            y = (1 - self.label_smoothing) * y + self.label_smoothing / classes
        if self.class_weights is not None:
            y = y * jnp.asarray(self.class_weights, y.dtype)
        if self.integer_labels:
            y = jnp.where(((labels < 0) | (labels >= classes))[..., None], jnp.nan, y)
            ignored = self._ignored(labels)
            if ignored is not None:  # also where the outputs there are not finite
                outputs, y = (jnp.where(ignored[..., None], 0, x) for x in (outputs, y))
        return outputs, y

    def _ignored(self, labels: Int[Array, "*S"]) -> Array | None:
        if self.ignore_index is None or not _fits(self.ignore_index, labels.dtype):
            return None
        return labels == self.ignore_index

    def _not_ignored(self, _: Array, target: Any) -> Any:
        ignored = self._ignored(jnp.asarray(target))
        return True if ignored is None else ~ignored[..., None]

    def _probabilities(self, outputs: Array, target: Any) -> tuple[Array, Array]:
        """p and s of each position of an example or a batch, `[..., K]` and `[..., 1]`."""
        logits, masses = self._read(outputs, target)
        return jax.nn.softmax(logits), jnp.sum(masses, -1, keepdims=True).astype(logits.dtype)

    def _value(self, outputs: Array, target: Any) -> Scalar:
        logits, masses = self._read(outputs, target)
        log_p = jax.nn.log_softmax(logits)
        log_p = jnp.where((masses == 0) & (log_p == -jnp.inf), 0, log_p)  # 0 log 0 = 0
        return -jnp.sum(masses * log_p)

    def _sample_of(self, key: Array, outputs: Array) -> Array:
        labels = drawn_class(key, outputs)
        if self.integer_labels:
            return labels
        return jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)

    def second_derivatives(self, outputs: Array, target: Any) -> None:
        return None  # of several classes the Hessian is no diagonal matrix

    def hessian(self, outputs: Array, target: Any) -> Float[Array, "K K"]:
        p, s = (_rows(x) for x in self._probabilities(outputs, target))
        blocks = _covariance(p[:, :, None] * p[:, None, :])
        return jax.scipy.linalg.block_diag(*(s[..., None] * blocks))

    def hessian_sqrt(self, outputs: Array, target: Any) -> Float[Array, "K R"]:
        p, s = (_rows(x) for x in self._probabilities(outputs, target))
        columns = jnp.arange(p.shape[-1] - 1)
        roots = jax.vmap(lambda q: jax.vmap(lambda k: _cholesky_column(q, k))(columns).T)(p)
        return jax.scipy.linalg.block_diag(*(jnp.sqrt(s)[..., None] * roots))

    def gauss_newton_product(
        self, outputs: Array, target: Any, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        p, s = (_rows(x) for x in self._probabilities(outputs, target))
        v = vector.reshape(p.shape)
        return (s * p * (v - jnp.sum(p * v, axis=-1, keepdims=True))).ravel()

    def mean_hessian(self, outputs: Array, targets: Any) -> Float[Array, "K K"]:
        # Of P'P / N with rows sqrt(s) p on each block: no matrix per example.
        p, s = self._probabilities(outputs, targets)
        count, classes = p.shape[0], p.shape[-1]
        half = (jnp.sqrt(s) * p).reshape(count, -1, classes)
        second = jnp.einsum("nti,ntj->tij", half, half, precision=precision()) / count
        return jax.scipy.linalg.block_diag(*_covariance(second))

    def sqrt_columns(self, outputs: Array, targets: Any) -> tuple[int, Columns]:
        p, s = self._probabilities(outputs, targets)
        count, classes = p.shape[0], p.shape[-1]
        p, half = p.reshape(count, -1, classes), jnp.sqrt(s).reshape(count, -1, 1)
        positions = p.shape[1]

        # One class less than there are: the Hessian of a position is singular.
        rank = classes - 1

        def column(k: Array) -> Float[Array, "N K"]:
            position, index = k // rank, k % rank
            here = jax.nn.one_hot(position, positions, dtype=p.dtype)
            column = _cholesky_column(jnp.take(p, position, axis=1), index)
            return (here[None, :, None] * half * column[:, None, :]).reshape(count, -1)

        return positions * rank, column

    def sampled_gradients(
        self, key: Array, outputs: Array, targets: Any, axis_name: AxisName | None = None
    ) -> Float[Array, "N K"]:
        # sqrt(s) (p - e_l) at labels l from p: of mean 0, and with the Hessian as covariance.
        p, s = self._probabilities(outputs, targets)
        keys = split_over_devices(key, p.shape[0], axis_name)
        labels = jax.vmap(drawn_class)(keys, self._read(outputs, targets)[0])
        drawn = jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype)
        return (jnp.sqrt(s) * (p - drawn)).reshape(p.shape[0], -1)

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        require_array(self, outputs)
        if outputs.ndim == 0:
            raise LossError(f"{self.name}: outputs need an axis of classes, found a scalar")
        classes, weights = outputs.shape[-1], self.class_weights
        if weights is not None and weights.size != classes:
            raise LossError(
                f"{self.name}: the outputs have {classes} classes, and there are "
                f"{weights.size} class_weights"
            )
        if self.integer_labels:
            require_shape(self, targets, outputs.shape[:-1], outputs.shape)
            if not jnp.issubdtype(targets.dtype, jnp.integer):
                raise LossError(
                    f"{self.name}: targets must be integer class indices, found dtype "
                    f"{targets.dtype}; for distributions use softmax_cross_entropy."
                )
        else:
            require_shape(self, targets, outputs.shape, outputs.shape)

    def check_targets(self, outputs: Array, targets: Any) -> None:
        classes = outputs.shape[-1]
        if self.integer_labels:
            labels = _wide(jnp.asarray(targets))
            ignored = self._ignored(labels)
            counted = labels if ignored is None else labels[~ignored]
            if bool(jnp.any((counted < 0) | (counted >= classes))):
                raise LossError(
                    f"{self.name}: targets must be class indices in [0, {classes - 1}], found "
                    f"{int(jnp.min(counted))} to {int(jnp.max(counted))}; check the number of "
                    "outputs of the model, and for labels that shall count for nothing take "
                    "loss.with_options(ignore_index=...)."
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


def _wide(labels: Int[Array, "*S"]) -> Int[Array, "*S"]:
    """Labels of a dtype that can tell the number of classes from all of them."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def _fits(index: int, dtype: Any) -> bool:
    return jnp.iinfo(dtype).min <= index <= jnp.iinfo(dtype).max


def _covariance(products: Float[Array, "T K K"]) -> Float[Array, "T K K"]:
    """`diag(p) - pp'` of the products pp', or their means, as p sums to one.

    An entry `p_i (1 - p_i)` is the sum of the others' `p_i p_j`: of probabilities near one the
    difference would be roundoff, and the matrix not semi-definite.
    """
    others = products * (1 - jnp.eye(products.shape[-1], dtype=products.dtype))
    return jax.vmap(jnp.diag)(jnp.sum(others, axis=-1)) - others


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


softmax_cross_entropy = _SoftmaxCrossEntropy("softmax_cross_entropy", integer_labels=False)
softmax_cross_entropy_with_integer_labels = _SoftmaxCrossEntropy(
    "softmax_cross_entropy_with_integer_labels", integer_labels=True
)
