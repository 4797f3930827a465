"""Solvers beside the Kronecker-factored ones: conjugate gradients, Newton, general minimizers."""

from kfgn.optimizers.conjugate_gradient import (
    Solution,
    block_gauss_newton_direction,
    conjugate_gradient,
)
from kfgn.optimizers.minimize import MINIMIZERS, Minimum, minimize
from kfgn.optimizers.newton import newton, newton_direction

__all__ = [
    "MINIMIZERS",
    "Minimum",
    "Solution",
    "block_gauss_newton_direction",
    "conjugate_gradient",
    "minimize",
    "newton",
    "newton_direction",
]
