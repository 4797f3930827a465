"""The parts of the optimizers as optax transformations, their damping rules and presets."""

from kfgn.optimizers.average_parameters import average_parameters
from kfgn.optimizers.clip_by_past_steps import clip_by_past_steps
from kfgn.optimizers.damping import (
    Damping,
    FactorDamping,
    Fixed,
    Following,
    Greedy,
    LevenbergMarquardt,
    StepDamping,
)
from kfgn.optimizers.hessian_free import scale_by_conjugate_gradient
from kfgn.optimizers.multi_steps import multi_steps
from kfgn.optimizers.newton import scale_by_newton
from kfgn.optimizers.presets import HESSIAN_FREE_PRESETS, PRESETS
from kfgn.optimizers.recipe import scale_by_curvature
from kfgn.optimizers.transforms import (
    clip_by_curvature,
    scale_by_kronecker,
    scale_by_quadratic_model,
)
from kfgn.optimizers.wrappers import without_curvature

__all__ = [
    "HESSIAN_FREE_PRESETS",
    "PRESETS",
    "Damping",
    "FactorDamping",
    "Fixed",
    "Following",
    "Greedy",
    "LevenbergMarquardt",
    "StepDamping",
    "average_parameters",
    "clip_by_curvature",
    "clip_by_past_steps",
    "multi_steps",
    "scale_by_conjugate_gradient",
    "scale_by_curvature",
    "scale_by_kronecker",
    "scale_by_newton",
    "scale_by_quadratic_model",
    "without_curvature",
]
