"""KFLR: the exact mean matrix from the output Hessian's square root, eqs. (23)-(25)."""

from kfgn.curvature.methods.method import Method, UseCost


class KFLR(Method):
    """`G = sum_k E[(J'c_k)(J'c_k)']` over the columns c_k of the root, one at a time."""

    name = "kflr"

    def flops(self, use: UseCost) -> int:
        return use.activation + use.columns * use.column
