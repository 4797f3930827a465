"""kfgn: curvature of neural networks and second-order optimization for JAX."""

from kfgn import diagnostics, errors, layers, losses, posterior, solvers, transforms
from kfgn.curvature import (
    Curvature,
    average_curvature,
    empirical_fisher,
    gauss_newton,
    hessian,
    value_grad_and_curvature,
)
from kfgn.diagnostics import inspect
from kfgn.objective.objective import Objective
from kfgn.objective.sum_of import sum_of
from kfgn.optimizers import kfac, kflr, kfra, make

__all__ = [
    "Curvature",
    "Objective",
    "average_curvature",
    "diagnostics",
    "empirical_fisher",
    "errors",
    "gauss_newton",
    "hessian",
    "inspect",
    "kfac",
    "kflr",
    "kfra",
    "layers",
    "losses",
    "make",
    "posterior",
    "solvers",
    "sum_of",
    "transforms",
    "value_grad_and_curvature",
]
__version__ = "0.1.0"
