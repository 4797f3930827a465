"""The Gaussian likelihood whose variance is an output, too."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.errors import LossError
from kfgn.base.types import Array, Scalar
from kfgn.objective.draws import drawn
from kfgn.objective.loss import Loss, Outputs
from kfgn.objective.shapes import require_shape


class _GaussianNegativeLogLikelihood(Loss):
    """`½ sum_k s_k + (y_k - m_k)² exp(-s_k)` of outputs `(m, s)`, mean and log variance.

    The negative logarithm of the density of N(m, exp s), without `½ log 2π`. The
    model returns a pair of arrays of the targets' shape. The Hessian is indefinite
    wherever y is not m; Gauss-Newton quantities take its expectation over the
    model's own distribution, Fisher's matrix `diag(exp(-s), ½)`, instead of the
    nearest semi-definite matrix.

    >>> import jax.numpy as jnp, kfgn
    >>> loss = kfgn.losses.gaussian_negative_log_likelihood
    >>> outputs, target = (jnp.zeros(1), jnp.zeros(1)), jnp.full(1, 2.0)
    >>> float(loss(outputs, target)), loss.hessian(outputs, target).tolist()
    (2.0, [[1.0, 2.0], [2.0, 2.0]])
    >>> loss.gauss_newton_hessian(outputs, target).tolist()
    [[1.0, 0.0], [0.0, 0.5]]
    """

    def __init__(self) -> None:
        def value(outputs: Outputs, target: Array) -> Scalar:
            mean, log_variance = outputs
            error = target - mean
            return 0.5 * jnp.sum(log_variance + jnp.square(error) * jnp.exp(-log_variance))

        def sample(key: Array, outputs: Outputs) -> Array:
            mean, log_variance = outputs
            noise = drawn(jax.random.normal, key, mean)
            return mean + jnp.exp(0.5 * log_variance) * noise

        super().__init__(value, "gaussian_negative_log_likelihood", False, sample)

    def second_derivatives(self, outputs: Outputs, target: Any) -> None:
        return None

    def gauss_newton_diagonal(self, outputs: Outputs, target: Any) -> Float[Array, " K"]:
        precision = jnp.exp(-outputs[1]).ravel()
        return jnp.concatenate([precision, jnp.full_like(precision, 0.5)])

    def check_shapes(self, outputs: Outputs, targets: Any) -> None:
        shapes: list[Any] = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(outputs)]
        if not isinstance(outputs, tuple | list) or len(shapes) != 2 or shapes[0] != shapes[1]:
            raise LossError(
                f"{self.name}: expected outputs (mean, log_variance), a pair of arrays of one "
                f"shape, found a {type(outputs).__name__} of {outputs}"
            )
        require_shape(self, targets, shapes[0], shapes[0])


gaussian_negative_log_likelihood = _GaussianNegativeLogLikelihood()
