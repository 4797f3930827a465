"""The parts of the optimizers as optax transformations of their own."""

from kfgn.optimizers.alias import PRESETS
from kfgn.optimizers.damping import Damping
from kfgn.optimizers.hessian_free import scale_by_conjugate_gradient
from kfgn.optimizers.newton import scale_by_newton
from kfgn.optimizers.recipe import scale_by_curvature
from kfgn.optimizers.transforms import (
    average_parameters,
    scale_by_kronecker,
    scale_by_quadratic_model,
)
from kfgn.optimizers.wrappers import without_curvature

__all__ = [
    "PRESETS",
    "Damping",
    "average_parameters",
    "scale_by_conjugate_gradient",
    "scale_by_curvature",
    "scale_by_kronecker",
    "scale_by_newton",
    "scale_by_quadratic_model",
    "without_curvature",
]
