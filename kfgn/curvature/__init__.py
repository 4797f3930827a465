"""Second derivatives: forward pass, Jacobians, the recursion, factors, methods, operators."""

from kfgn.curvature.averaging import average_curvature
from kfgn.curvature.batch import Curvature, CurvatureSettings, value_grad_and_curvature
from kfgn.curvature.dense import (
    dense_gauss_newton,
    dense_hessian,
    gauss_newton_rank,
    output_hessian,
    output_jacobian,
)
from kfgn.curvature.exact import (
    block_gauss_newton,
    block_hessian,
    gauss_newton_diagonal,
    hessian_diagonal,
    pre_activation_gauss_newton,
    pre_activation_hessian,
)
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.curvature.parameter_blocks import (
    ParameterHessian,
    ParameterHessianProducts,
    parameter_hessian,
)
from kfgn.curvature.products import gauss_newton_vector_product, hessian_vector_product

__all__ = [
    "Curvature",
    "CurvatureSettings",
    "Diagonal",
    "Factors",
    "ParameterHessian",
    "ParameterHessianProducts",
    "average_curvature",
    "block_gauss_newton",
    "block_hessian",
    "dense_gauss_newton",
    "dense_hessian",
    "gauss_newton_diagonal",
    "gauss_newton_rank",
    "gauss_newton_vector_product",
    "hessian_diagonal",
    "hessian_vector_product",
    "output_hessian",
    "output_jacobian",
    "parameter_hessian",
    "pre_activation_gauss_newton",
    "pre_activation_hessian",
    "value_grad_and_curvature",
]
