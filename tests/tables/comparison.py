"""One row of models with one row of losses: all that kfgn says of it, beside the dense truth."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfgn
from tests.tables.dense import Index, Truth, dense_truth, indices, own_entries
from tests.tables.losses import LOSSES
from tests.tables.nets import MODELS, Case

# In the objectives of all these tests. The curvature of the penalty is no part
# of any matrix, which a value that is not zero tests.
L2 = 0.1

OPERATORS = {
    "hessian": kfgn.hessian,
    "gauss_newton": kfgn.gauss_newton,
    "empirical_fisher": kfgn.empirical_fisher,
}


class Comparison(NamedTuple):
    """What was computed for one model with one loss."""

    case: Case
    targets: Any
    truth: Truth
    index: dict[str, Index]
    own: np.ndarray  # places of the model's own parameters among the truth's
    direction: np.ndarray  # a random one, `[P]`, zero outside the model's own parameters
    ours: dict[str, Any]  # results of kfgn by what was asked, as numpy arrays


class Setting(NamedTuple):
    """A case with its objective and batch."""

    case: Case
    objective: kfgn.Objective
    batch: tuple[Any, Any]


@functools.cache
def case_of(model: str, dtype: Any, count: int, x64: bool) -> Case:
    """Made once for all losses: kfgn looks at a model that it knows no second time."""
    return MODELS[model].case(dtype, count)


def setting(model: str, loss: str | None = None, dtype: Any = jnp.float64, count: int = 4):
    """The objective and batch of a row of models, with its own loss or another."""
    loss_row = LOSSES[loss or MODELS[model].loss]
    case = case_of(model, dtype, count, jax.config.jax_enable_x64)
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = loss_row.targets(jax.random.key(7), outputs)
    return Setting(case, kfgn.Objective(case.model, loss_row.loss, l2=L2), (case.inputs, targets))


@functools.cache
def compare(model: str, loss: str | None = None) -> Comparison:
    """kfgn and the truth on four examples in float64; needs the fixture `x64`.

    Blocks and products, in which the loss plays no part of its own, are left
    out where the loss is not that of the model's row.
    """
    if loss == MODELS[model].loss:
        return compare(model)
    case, objective, (inputs, targets) = setting(model, loss)
    truth = dense_truth(case, LOSSES[loss or MODELS[model].loss], targets)
    index, own = indices(case), own_entries(case)
    direction = np.zeros(truth.gradient.shape)
    direction[own] = np.random.default_rng(3).normal(size=own.shape)
    kinds = operators_of(model) if loss is None else ()
    everything = jax.jit(functools.partial(_everything, objective, kinds))
    ours = everything(
        case.params,
        (inputs, targets),
        as_params(case, direction[own]),
        {name: direction[i.block] for name, i in index.items()},
    )
    ours = jax.tree.map(np.asarray, ours)
    return Comparison(case, targets, truth, index, own, direction, ours)


# Those with an answer to the questions about chunks and calls without jit.
WITH_FISHER = ("tanh", "several_depths", "gated", "residual")


def operators_of(model: str) -> tuple[str, ...]:
    """Those whose blocks and products a model is compared in."""
    return tuple(OPERATORS) if model in WITH_FISHER else ("hessian", "gauss_newton")


def _everything(objective, whole, params, batch, vector, matrices):
    first = jax.tree.map(lambda a: a[:1], batch)
    operators = {kind: make(objective) for kind, make in OPERATORS.items()}
    result = {
        f"pre_activation_{kind}": operator.pre_activation(params, batch)
        for kind, operator in operators.items()
    }
    result |= {
        "one_example": {
            method: kfgn.value_grad_and_curvature(objective, method)(params, first)[1].factors
            for method in ("kfra", "kflr")
        },
    }
    for method in ("kfra", "kflr", "empirical"):
        value_and_grad, curvature = kfgn.value_grad_and_curvature(objective, method)(params, batch)
        result[method] = {"value_and_grad": value_and_grad, "factors": curvature.factors}
    named = by_path(vector)
    pushed = curvature.linearized(named)
    result["model"] = {
        "linearized": pushed,
        "curved": curvature.output_product(pushed, pushed),
        "value": curvature.value,
        "gradient": curvature.gradient,
        "displaced": curvature.displaced(named),
        "objective": objective(jax.tree.map(jnp.add, params, vector), batch),
    }
    if not whole:
        return result
    operators = {kind: operators[kind] for kind in whole}
    for kind, operator in operators.items():
        result[f"block_{kind}"] = operator.blocks(params, batch)
        result[f"{kind}_diagonal"] = operator.diagonal(params, batch)
        result[f"{kind}_product"] = operator.matvec(params, batch, vector)
    # A matrix-vector product transposes the whole model: one layer of each is enough.
    name = next(iter(matrices))
    for kind, operator in operators.items():
        matvecs = operator.block_matvecs(params, batch)
        result[f"block_{kind}_matvec"] = {name: matvecs[name](matrices[name])}
    return result


def as_params(case: Case, flat: np.ndarray) -> Any:
    """A vector of the model's own parameters as a pytree like them."""
    leaves, tree = jax.tree.flatten(case.params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(flat, ends[:-1])
    shaped = [jnp.asarray(x.reshape(a.shape), a.dtype) for x, a in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(tree, shaped)


def by_path(params: Any) -> dict[str, jax.Array]:
    """A pytree like params as a dictionary by parameter name, for directions."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in leaves}
    return {name.removesuffix("/value"): leaf for name, leaf in named.items()}


def close(actual: Any, expected: Any, what: str = "", digits: float = 1e-10) -> None:
    """Asserts equality up to roundoff, relative to the largest entry expected.

    float64 rounds at 1e-16 and the sums here are short; cancellation between
    their terms may cost a few digits of a small result. What is wrong in
    structure is wrong by far more than 1e-10. An expected zero leaves nothing
    to be relative to: there the terms, of order 1, round at 1e-16 each.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    assert np.all(np.isfinite(actual)), f"{what}: not finite"
    error = np.max(np.abs(actual - expected), initial=0)
    bound = digits * np.max(np.abs(expected), initial=0) + 1e-13
    assert error <= bound, f"{what}: off by {error:.1e}, more than {bound:.1e}"
