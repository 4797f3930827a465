"""Curvature of parameters in no layer: the exact block of each, or its diagonal."""

import jax
import jax.numpy as jnp

from kfgn.base.linalg import second_moment, sum_of_examples
from kfgn.base.trees import batch_of, first_of
from kfgn.base.types import Array, PyTree
from kfgn.curvature.factors import Diagonal, Factors
from kfgn.curvature.forward_pass import Linearized, as_outputs


def own_factors(model: Linearized, whole: bool) -> dict[str, Diagonal | Factors]:
    """The exact block of the Gauss-Newton matrix, or its diagonal, for parameters in no layer.

    `sum_k E[(J'c_k) (J'c_k)']` over the columns c_k of the output Hessian's root: each
    example sees a copy of the parameters, whose gradients are so its own.
    """

    def outputs_of(own: dict[str, Array], example: PyTree) -> PyTree:
        inputs, statistics = batch_of(example)
        params = {**model.params, **own}
        return first_of(model.graph.forward(params, inputs, statistics=statistics)[0])

    copies = {
        name: jnp.broadcast_to(model.params[name], (model.examples, *model.params[name].shape))
        for name in model.graph.reasons
    }
    examples = model.inputs, model.statistics
    _, pull = jax.vjp(lambda own: jax.vmap(outputs_of)(own, examples), copies)
    count, column = model.loss.sqrt_columns(model.outputs, model.targets)

    def moments(index: Array) -> dict[str, Array]:
        (gradients,) = pull(as_outputs(column(index), model.outputs))
        rows = {name: g.astype(model.dtype) for name, g in gradients.items()}
        if whole:
            return {name: second_moment(g.reshape(len(g), -1)) for name, g in rows.items()}
        return {name: jnp.mean(jnp.square(g), axis=0) for name, g in rows.items()}

    found = sum_of_examples(moments, jnp.arange(count))
    one = jnp.ones((1, 1), model.dtype)
    return {name: Factors(one, m) if whole else Diagonal(m) for name, m in found.items()}
