"""What is minimized: an objective, its per-example loss, and which examples a solver sees."""

from kfgn.objective.batches import batches
from kfgn.objective.loss import Loss, from_function
from kfgn.objective.objective import Objective

__all__ = ["Loss", "Objective", "batches", "from_function"]
