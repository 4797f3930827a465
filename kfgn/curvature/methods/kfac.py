"""KFAC: gradients at targets sampled from the model, eq. (59)."""

from collections.abc import Callable

import jax

from kfgn.base.linalg import sum_of_examples
from kfgn.base.types import Array, PyTree
from kfgn.curvature.methods.method import LossCost, Method, Request, UseCost


class KFAC(Method):
    """`G = E[gg']` of gradients g at the pre-activations, of losses at sampled targets.

    A loss that is no likelihood has the root of its output Hessian instead, with random signs.
    """

    name = "kfac"
    draws = True

    def over_columns(self, request: Request, of: Callable[[Array], PyTree]) -> PyTree:
        loss, outputs = request.model.loss, request.model.outputs
        targets = request.model.targets
        assert request.key is not None  # `check_key` saw to it
        keys = jax.random.split(request.key, request.samples)
        total = sum_of_examples(
            lambda key: of(loss.sampled_gradients(key, outputs, targets, request.axis_name)),
            keys,
        )
        return jax.tree.map(lambda x: x / request.samples, total)

    def flops(self, use: UseCost) -> int:
        return use.activation + use.column

    def flops_between(self, walk: int, loss: LossCost) -> int:
        return loss.drawn

    def passes(self, columns: int) -> int:
        return 1
