"""Second derivatives: forward pass, Jacobians, the recursion, factors, methods, operators."""

from kfgn.curvature.averaging import average_curvature
from kfgn.curvature.batch import value_grad_and_curvature
from kfgn.curvature.blocks import ParameterBlocks
from kfgn.curvature.curvature import Curvature, CurvatureSettings
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.curvature.operator import Operator
from kfgn.curvature.operators import empirical_fisher, gauss_newton, hessian

__all__ = [
    "Curvature",
    "CurvatureSettings",
    "Diagonal",
    "Factors",
    "Operator",
    "ParameterBlocks",
    "average_curvature",
    "empirical_fisher",
    "gauss_newton",
    "hessian",
    "value_grad_and_curvature",
]
