"""Per-example losses that know the curvature of their outputs."""

from kfgn.objective.elementwise import (
    half_squared_error,
    huber,
    poisson_negative_log_likelihood,
    quantile,
    sigmoid_binary_cross_entropy,
)
from kfgn.objective.gaussian import gaussian_negative_log_likelihood
from kfgn.objective.loss import Loss, from_function
from kfgn.objective.masked import masked
from kfgn.objective.softmax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels

__all__ = [
    "Loss",
    "from_function",
    "gaussian_negative_log_likelihood",
    "half_squared_error",
    "huber",
    "masked",
    "poisson_negative_log_likelihood",
    "quantile",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
