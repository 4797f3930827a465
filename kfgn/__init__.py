"""kfgn: curvature of neural networks and second-order optimisation for JAX."""

from kfgn import losses
from kfgn.adaptive import scale_by_curvature
from kfgn.alias import PRESETS, kfac, kflr, kfra
from kfgn.averaging import average_curvature
from kfgn.blocks import Blocks, layers
from kfgn.curvature import Curvature, value_grad_and_curvature
from kfgn.damping import Damping
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
from kfgn.exact import (
    block_gauss_newton,
    block_hessian,
    gauss_newton_diagonal,
    gauss_newton_vector_product,
    hessian_diagonal,
    hessian_vector_product,
    pre_activation_gauss_newton,
    pre_activation_hessian,
)
from kfgn.factors import Diagonal, Factors
from kfgn.inspection import Inspection, inspect
from kfgn.objective import Objective
from kfgn.registry import register_layer, register_primitive
from kfgn.transform import average_parameters, scale_by_kronecker, scale_by_quadratic_model
from kfgn.use import Form

__all__ = [
    "PRESETS",
    "BatchError",
    "Blocks",
    "Curvature",
    "Damping",
    "Diagonal",
    "Factors",
    "Form",
    "Inspection",
    "KfgnError",
    "LayerError",
    "LossError",
    "ModelError",
    "Objective",
    "OptionError",
    "ParameterError",
    "UnknownPrimitiveWarning",
    "average_curvature",
    "average_parameters",
    "block_gauss_newton",
    "block_hessian",
    "gauss_newton_diagonal",
    "gauss_newton_vector_product",
    "hessian_diagonal",
    "hessian_vector_product",
    "inspect",
    "kfac",
    "kflr",
    "kfra",
    "layers",
    "losses",
    "pre_activation_gauss_newton",
    "pre_activation_hessian",
    "register_layer",
    "register_primitive",
    "scale_by_curvature",
    "scale_by_kronecker",
    "scale_by_quadratic_model",
    "value_grad_and_curvature",
]
__version__ = "0.1.0"
