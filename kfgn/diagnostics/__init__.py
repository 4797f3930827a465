"""Looking: what kfgn sees in a model, derivatives checked, spectra, updates."""

from kfgn.diagnostics.inspect import Inspection, inspect
from kfgn.diagnostics.machine import Machine, measure_machine
from kfgn.diagnostics.negative_curvature import NegativeCurvature, negative_curvature
from kfgn.diagnostics.per_device import PerDevice
from kfgn.diagnostics.plan import Plan
from kfgn.diagnostics.record import record
from kfgn.diagnostics.spectra import (
    SpectralDensity,
    Spectrum,
    cosine,
    largest_eigenvalues,
    spectral_density,
    spectrum,
)
from kfgn.diagnostics.taylor import CheckResult, curvature_check, gradient_check

__all__ = [
    "CheckResult",
    "Inspection",
    "Machine",
    "NegativeCurvature",
    "PerDevice",
    "Plan",
    "SpectralDensity",
    "Spectrum",
    "cosine",
    "curvature_check",
    "gradient_check",
    "inspect",
    "largest_eigenvalues",
    "measure_machine",
    "negative_curvature",
    "record",
    "spectral_density",
    "spectrum",
]
