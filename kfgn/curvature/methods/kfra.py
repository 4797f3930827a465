"""KFRA: the mean matrix walks backwards through the model, eq. (26)."""

from jaxtyping import Float

from kfgn.base.devices import mean_over_devices, vary_like
from kfgn.base.types import Array
from kfgn.curvature.channels import walk_channels
from kfgn.curvature.factors import Moments, over_positions, walked_moments
from kfgn.curvature.methods.method import LossCost, Method, Request, UseCost
from kfgn.curvature.recursion import Walk, walk_back


class KFRA(Method):
    """`G_i = E[J' G_o J]` from node to node, with one matrix for all examples."""

    name = "kfra"
    probes = False
    walks = True
    spatial = ("joint", "homogeneous")

    def moments(self, request: Request) -> dict[str, Moments]:
        sums = _recursion(request)
        model, sharing = request.model, request.sharing
        return {
            name: walked_moments(layer, sums, sharing, model.weights)
            for name, layer in model.graph.layers.items()
        }

    def flops(self, use: UseCost) -> int:
        return use.activation + use.congruence

    def flops_between(self, walk: int, loss: LossCost) -> int:
        return walk + loss.mean


def _recursion(request: Request) -> dict[str, Float[Array, "s o o"]]:
    """What the mean matrix leaves at every use, summed over its positions."""
    model, sharing = request.model, request.sharing
    graph = model.graph
    hessian = model.loss.mean_hessian(model.outputs, model.targets).astype(model.dtype)
    hessian = vary_like(mean_over_devices(hessian, request.axis_name), model.outputs)
    shared = graph.shared_values(model.params)
    walk = Walk(graph, shared, model.values, request.axis_name, request.importance)
    if request.spatial == "homogeneous":
        sums = walk_channels(walk, hessian)
        often = {
            n: model.weights[n].positions / u.form.positions
            for n, u in graph.uses.items()
            if u.choice is not None
        }
        return {n: s * often[n] if n in often else s for n, s in sums.items()}
    layer_of = {name: layer for layer in graph.layers.values() for name in layer.uses}
    matrices = walk_back(walk, hessian).uses
    return {
        n: over_positions(layer_of[n], u, matrices[n], sharing, model.weights.get(n))
        for n, u in graph.uses.items()
    }
