"""Looking: what kfgn sees in a model, derivatives checked, negative curvature, accuracy."""

from kfgn.diagnostics.accuracy import BiasVariance, accuracy, bias_variance
from kfgn.diagnostics.inspect import Inspection, inspect
from kfgn.diagnostics.negative_curvature import NegativeCurvature, negative_curvature
from kfgn.diagnostics.taylor import (
    CheckResult,
    curvature_check,
    gradient_check,
    iterations_to_tolerance,
)

__all__ = [
    "BiasVariance",
    "CheckResult",
    "Inspection",
    "NegativeCurvature",
    "accuracy",
    "bias_variance",
    "curvature_check",
    "gradient_check",
    "inspect",
    "iterations_to_tolerance",
    "negative_curvature",
]
