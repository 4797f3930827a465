"""Steps: the preconditioner, the quadratic model, damping, the recipe, solvers, wrappers."""

from kfgn.optimizers.alias import kfac, kflr, kfra
from kfgn.optimizers.cg_preconditioner import empirical_fisher_diagonal

__all__ = ["empirical_fisher_diagonal", "kfac", "kflr", "kfra"]
