"""Which places of an example Q is of: not of those that reach only outputs which the loss ignores.

Padding and missing labels add nothing to a block, whose sum goes over the other places. In Q these
have the others' mean, and G stays what it is: the product is then that of a batch without them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.devices import mean_over_devices
from kfgn.base.linalg import total, weighed
from kfgn.base.types import Array
from kfgn.curvature.factors import sharing_of, slots_of
from kfgn.curvature.methods import Request
from kfgn.model.layers.layer import Layer


def routes(request: Request) -> dict[str, Float[Array, "N s t"]]:
    """What the rows of Q are multiplied by in every place of a use, by its name, if not by 1.

    That is 0 where data routes an example elsewhere, or where nothing of a place is heeded.
    """
    own = {n: w.route for n, w in request.model.weights.items() if w.route is not None}
    reached = _reached(request)
    for layer in request.model.graph.layers.values() if reached else ():
        counted = {n: reached[n] * own.get(n, 1) for n in layer.uses}
        for slot in slots_of(layer):
            own |= _scaled(request, layer, {n: counted[n] for n in slot}, own)
    return own


def _reached(request: Request) -> dict[str, Float[Array, "N s t"]]:
    """Ones in the places that outputs which count depend on.

    A cotangent that has no zeros at these comes back there. Where an example has no output that
    is ignored all of its places count, those of dead units too.
    """
    model = request.model
    heeded = model.loss.heeded(model.outputs, model.targets)
    if heeded is None:
        return {}
    pattern = jnp.asarray(np.cos(1.0 + np.arange(heeded.shape[1])), model.dtype)
    _, cotangents = model.pull(jnp.where(heeded, pattern, 0))
    whole = jnp.all(heeded, axis=1)[:, None, None]
    found = {}
    for name, use in model.graph.uses.items():
        comes = jnp.any(use.pre_activations(cotangents[name]) != 0, axis=3)
        found[name] = (comes | whole).astype(model.dtype)
    return found


def _scaled(
    request: Request, layer: Layer, counted: dict[str, Array], routed: dict[str, Array]
) -> dict[str, Float[Array, "N s t"]]:
    """Of a slot's uses, such that the places that count stand for all."""

    def mean(x: Array) -> Array:
        own = jnp.mean(weighed(request.importance, x), axis=0)
        return mean_over_devices(own, request.axis_name)

    places = {n: routed.get(n, jnp.ones_like(x)) for n, x in counted.items()}
    there, here = (total(jnp.sum(x, axis=2) for x in xs.values()) for xs in (places, counted))
    if sharing_of(layer, request.sharing) == "reduce":  # means over an example's own
        each = there / jnp.maximum(here, 1)
        share = mean((here > 0).astype(here.dtype))
    else:
        each, share = jnp.ones_like(here), mean(here) / jnp.maximum(mean(there), 1e-30)
    scale = each / jnp.sqrt(jnp.where(share > 0, share, 1))
    return {
        n: jnp.where(share[:, None] > 0, x * scale[..., None], places[n])
        for n, x in counted.items()
    }
