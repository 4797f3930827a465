"""The empirical Fisher matrix: gradients at the batch's own targets."""

from kfgn.curvature.factors import Moments
from kfgn.curvature.methods.method import Method, Request, UseCost
from kfgn.objective.weights import rooted


class Empirical(Method):
    """`G = E[gg']` of the gradients g at the pre-activations."""

    name = "empirical"

    def moments(self, request: Request) -> dict[str, Moments]:
        model = request.model
        targets, _ = rooted(model.targets)
        return request.column_moments(model.loss.gradients(model.outputs, targets))

    def flops(self, use: UseCost) -> int:
        return use.activation + use.column
