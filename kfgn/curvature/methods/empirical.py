"""The empirical Fisher matrix: gradients at the batch's own targets."""

from __future__ import annotations

from kfgn.curvature.methods.method import Method


class Empirical(Method):
    """`G = E[gg']` of the gradients g at the pre-activations."""

    name = "empirical"

    def moments(self, request):
        model = request.model
        return request.column_moments(model.loss.gradients(model.outputs, model.targets))

    def flops(self, use):
        return use.activation + use.column
