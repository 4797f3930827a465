"""What is minimized: an objective, and its per-example loss."""

from kfgn.objective.loss import Loss, from_function
from kfgn.objective.objective import Objective

__all__ = ["Loss", "Objective", "from_function"]
