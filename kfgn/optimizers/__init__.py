"""Steps: the preconditioner, the quadratic model, damping, the recipe, solvers, wrappers."""

from kfgn.optimizers.alias import kfac, kflr, kfra

__all__ = ["kfac", "kflr", "kfra"]
