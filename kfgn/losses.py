"""Per-example losses that know the curvature of their outputs."""

from kfgn.objective.losses import (
    Loss,
    from_function,
    half_squared_error,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)

__all__ = [
    "Loss",
    "from_function",
    "half_squared_error",
    "sigmoid_binary_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
]
