"""The curvature as a posterior: Laplace's approximation, predictions, evidence, influence."""

from kfgn.posterior.gaussian import Posterior
from kfgn.posterior.influence import influence
from kfgn.posterior.laplace import laplace

__all__ = [
    "Posterior",
    "influence",
    "laplace",
]
