"""Looking: what kfgn sees in a model, derivatives checked, negative curvature, updates."""

from kfgn.diagnostics.inspect import Inspection, inspect
from kfgn.diagnostics.negative_curvature import NegativeCurvature, negative_curvature
from kfgn.diagnostics.record import record
from kfgn.diagnostics.taylor import CheckResult, curvature_check, gradient_check

__all__ = [
    "CheckResult",
    "Inspection",
    "NegativeCurvature",
    "curvature_check",
    "gradient_check",
    "inspect",
    "negative_curvature",
    "record",
]
