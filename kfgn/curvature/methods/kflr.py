"""KFLR: the exact mean matrix from the output Hessian's square root, eqs. (23)-(25)."""

import jax.numpy as jnp

from kfgn.base.linalg import sum_of_examples
from kfgn.curvature.factors import Moments
from kfgn.curvature.methods.method import Method, Request, UseCost


class KFLR(Method):
    """`G = sum_k E[(J'c_k)(J'c_k)']` over the columns c_k of the root, one at a time."""

    name = "kflr"

    def moments(self, request: Request) -> dict[str, Moments]:
        count, column = request.model.loss.sqrt_columns(
            request.model.outputs, request.model.targets
        )
        return sum_of_examples(lambda k: request.column_moments(column(k)), jnp.arange(count))

    def flops(self, use: UseCost) -> int:
        return use.activation + use.columns * use.column
