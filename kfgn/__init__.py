"""kfgn: curvature of neural networks and second-order optimisation for JAX."""

from kfgn import losses
from kfgn.adaptive import scale_by_curvature
from kfgn.alias import PRESETS, kfac, kflr, kfra
from kfgn.averaging import average_curvature
from kfgn.block_gauss_newton_cg import block_gauss_newton_direction
from kfgn.blocks import Blocks, layers
from kfgn.cg import Solution, conjugate_gradient
from kfgn.cg_preconditioner import empirical_fisher_diagonal
from kfgn.convexity import NegativeCurvature, negative_curvature
from kfgn.curvature import Curvature, value_grad_and_curvature
from kfgn.damping import Damping
from kfgn.dense import (
    dense_gauss_newton,
    dense_hessian,
    gauss_newton_rank,
    output_hessian,
    output_jacobian,
)
from kfgn.derivatives import UnknownPrimitiveWarning
from kfgn.errors import (
    BatchError,
    KfgnError,
    LayerError,
    LossError,
    ModelError,
    OptionError,
    ParameterError,
)
from kfgn.evaluation import BiasVariance, accuracy, bias_variance
from kfgn.exact import (
    block_gauss_newton,
    block_hessian,
    gauss_newton_diagonal,
    hessian_diagonal,
    pre_activation_gauss_newton,
    pre_activation_hessian,
)
from kfgn.factors import Diagonal, Factors
from kfgn.hessian_free import HESSIAN_FREE_PRESETS, scale_by_conjugate_gradient
from kfgn.inspection import Inspection, inspect
from kfgn.keywords import without_curvature
from kfgn.minimise import Minimum, minimise
from kfgn.newton import newton, newton_direction, scale_by_newton
from kfgn.objective import Objective
from kfgn.parameter_blocks import (
    ParameterHessian,
    ParameterHessianProducts,
    parameter_hessian,
)
from kfgn.products import gauss_newton_vector_product, hessian_vector_product
from kfgn.registry import register_layer, register_primitive
from kfgn.sampling import batches
from kfgn.transform import average_parameters, scale_by_kronecker, scale_by_quadratic_model
from kfgn.use import Form
from kfgn.verification import (
    CheckResult,
    curvature_check,
    gradient_check,
    iterations_to_tolerance,
)

__all__ = [
    "HESSIAN_FREE_PRESETS",
    "PRESETS",
    "BatchError",
    "BiasVariance",
    "Blocks",
    "CheckResult",
    "Curvature",
    "Damping",
    "Diagonal",
    "Factors",
    "Form",
    "Inspection",
    "KfgnError",
    "LayerError",
    "LossError",
    "Minimum",
    "ModelError",
    "NegativeCurvature",
    "Objective",
    "OptionError",
    "ParameterError",
    "ParameterHessian",
    "ParameterHessianProducts",
    "Solution",
    "UnknownPrimitiveWarning",
    "accuracy",
    "average_curvature",
    "average_parameters",
    "batches",
    "bias_variance",
    "block_gauss_newton",
    "block_gauss_newton_direction",
    "block_hessian",
    "conjugate_gradient",
    "curvature_check",
    "dense_gauss_newton",
    "dense_hessian",
    "empirical_fisher_diagonal",
    "gauss_newton_diagonal",
    "gauss_newton_rank",
    "gauss_newton_vector_product",
    "gradient_check",
    "hessian_diagonal",
    "hessian_vector_product",
    "inspect",
    "iterations_to_tolerance",
    "kfac",
    "kflr",
    "kfra",
    "layers",
    "losses",
    "minimise",
    "negative_curvature",
    "newton",
    "newton_direction",
    "output_hessian",
    "output_jacobian",
    "parameter_hessian",
    "pre_activation_gauss_newton",
    "pre_activation_hessian",
    "register_layer",
    "register_primitive",
    "scale_by_conjugate_gradient",
    "scale_by_curvature",
    "scale_by_kronecker",
    "scale_by_newton",
    "scale_by_quadratic_model",
    "value_grad_and_curvature",
    "without_curvature",
]
__version__ = "0.1.0"
