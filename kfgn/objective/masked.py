"""Sums over those outputs alone that a mask among the targets keeps."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.devices import AxisName
from kfgn.base.errors import LossError
from kfgn.base.types import Array
from kfgn.objective.elementwise import Elementwise
from kfgn.objective.loss import Loss
from kfgn.objective.shapes import require_array


class _Masked(Elementwise):
    """The entries of a loss that a mask among the targets `(y, mask)` keeps."""

    def __init__(self, loss: Elementwise) -> None:
        def entries(outputs: Array, target: tuple[Array, Array]) -> Array:
            o, y, mask = _shown(outputs, target)
            return jnp.where(mask, loss.entries(o, y), 0)

        super().__init__(entries, f"masked({loss.name})", loss._sample, lambda _, y: y[1])
        self.loss = loss

    def second_derivatives(self, outputs: Array, target: Any) -> Float[Array, " K"]:
        o, y, mask = _shown(outputs, target)
        return jnp.where(mask.ravel(), self.loss.second_derivatives(o, y), 0)

    def sampled_gradients(
        self, key: Array, outputs: Array, targets: Any, axis_name: AxisName | None = None
    ) -> Float[Array, "N K"]:
        o, y, mask = _shown(outputs, targets)
        drawn = self.loss.sampled_gradients(key, o, y, axis_name)
        return jnp.where(mask.reshape(drawn.shape), drawn, 0)

    def check_shapes(self, outputs: Array, targets: Any) -> None:
        require_array(self, outputs)
        pair = isinstance(targets, tuple | list) and len(targets) == 2
        if not pair or getattr(targets[1], "shape", None) != outputs.shape:
            raise LossError(
                f"{self.name}: expected targets (y, mask), and a mask of the outputs' shape "
                f"{outputs.shape}, found {targets}"
            )
        self.loss.check_shapes(outputs, targets[0])

    def check_targets(self, outputs: Array, targets: Any) -> None:
        self.loss.check_targets(outputs, _kept(*targets))  # outputs may be shapes


def _shown(outputs: Array, target: Any) -> tuple[Array, Array, Array]:
    """Outputs and targets, zeros where they are masked, and the mask."""
    mask = jnp.asarray(target[1], bool)
    return _kept(outputs, mask), _kept(*target), mask


def _kept(x: Array, mask: Array) -> Array:
    return jnp.where(jnp.asarray(mask, bool), x, jnp.zeros_like(x))


def masked(loss: Loss) -> Loss:
    """A loss that is a sum over the outputs, of those alone that a mask keeps.

    Targets are `(y, mask)`, both of the outputs' shape: missing values, or padding of
    series and sets. What is masked may be anything, NaN included, and counts for nothing.

    Args:
      loss: `half_squared_error`, `sigmoid_binary_cross_entropy`,
        `poisson_negative_log_likelihood`, `huber(...)` or `quantile(...)`.

    Returns:
      The loss.

    Raises:
      LossError: the loss is another one.

    >>> import jax.numpy as jnp, kfgn
    >>> loss = kfgn.losses.masked(kfgn.losses.half_squared_error)
    >>> target = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
    >>> float(loss(jnp.zeros(2), target)), loss.hessian(jnp.zeros(2), target).tolist()
    (0.5, [[1.0, 0.0], [0.0, 0.0]])
    """
    if not isinstance(loss, Elementwise):
        raise LossError(
            f"masked takes a loss that is a sum over the outputs, found {loss!r}; the "
            "cross-entropies of classes have ignore_index, and a loss of your own, of "
            "kfgn.losses.from_function, can read a mask among its targets and say so by heeded="
        )
    return _Masked(loss)
