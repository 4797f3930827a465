"""The empirical Fisher matrix: gradients at the batch's own targets."""

from collections.abc import Callable

from kfgn.base.types import Array, PyTree
from kfgn.curvature.methods.method import LossCost, Method, Request, UseCost
from kfgn.objective.weights import rooted


class Empirical(Method):
    """`G = E[gg']` of the gradients g at the pre-activations."""

    name = "empirical"

    def over_columns(self, request: Request, of: Callable[[Array], PyTree]) -> PyTree:
        model = request.model
        targets, _ = rooted(model.targets)
        return of(model.loss.gradients(model.outputs, targets))

    def flops(self, use: UseCost) -> int:
        return use.activation + use.column

    def flops_between(self, walk: int, loss: LossCost) -> int:
        return 0

    def passes(self, columns: int) -> int:
        return 1
