"""Value, gradient and Kronecker factors of an objective from one forward pass."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kfgn.base.errors import OptionError
from kfgn.base.linalg import inner, sum_of_examples
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, PyTree
from kfgn.curvature.factors import (
    Diagonal,
    Factors,
    activation_moments,
    assemble,
    check_sharing,
)
from kfgn.curvature.forward_pass import Linearized, as_outputs, linearize
from kfgn.curvature.methods import METHODS, Method, Request, method_of
from kfgn.model.graph import build_graph
from kfgn.model.layer import require_blocks
from kfgn.objective.loss import Loss
from kfgn.objective.objective import Objective, check_batch, mean_of, require_objective

# What may be done with parameters in no layer.
UNASSIGNED = ("raise", "diagonal", "gradient")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CurvatureSettings:
    """What a curvature was made with: the arguments of `value_grad_and_curvature`.

    A pytree without leaves: it is part of the tree structure of a `Curvature`.
    """

    method: str
    samples: int
    sharing: str
    spatial: str
    model_examples: int | None
    unassigned: str
    l2: float | None  # the objective's; None where it is an array, whose value may be unknown


class Curvature(NamedTuple):
    """Everything an update needs to know about a batch, as one pytree.

    The callables are `jax.tree_util.Partial`, so all of it crosses jit.
    Directions are dictionaries from parameter name to array; absent names
    stand for zeros.
    """

    factors: dict[str, Factors | Diagonal]  # by layer; diagonals by parameter
    value: Array  # the objective, l2 included
    gradient: dict[str, Array]  # its gradient, l2 included
    # Of all examples, or of the `model_examples` that stand for them, n:
    linearized: Partial  # direction -> the outputs' change to first order, `[n, K]`
    output_product: Partial  # (u, v) of `[n, K]` -> mean of u'Hv, H the output Hessian
    displaced: Partial  # direction -> the objective at params + direction
    settings: CurvatureSettings  # static: what it was made with


def value_grad_and_curvature(
    objective: Objective,
    method: str = "kfra",
    *,
    samples: int = 1,
    sharing: str = "expand",
    spatial: str = "joint",
    model_examples: int | None = 256,
    unassigned: str = "raise",
) -> Callable[..., tuple[tuple[Array, PyTree], Curvature]]:
    """A function `(params, batch) -> ((value, grads), curvature)`.

    Args:
      objective: the objective; its l2 term enters value and gradient, and never
        the factors, which are those of the mean per-example loss.
      method: how the pre-activation factors are made. "kfra": the mean matrix
        walks backwards, eq. (26). "kflr": the exact E[G] from the columns of
        the output Hessian's square root, eq. (25), one column at a time.
        "kfac": gradients at targets sampled from the model, eq. (59); the
        function then takes `key=`. "empirical": gradients at the batch's own
        targets.
      samples: for "kfac", the number of targets drawn per example.
      sharing: what stands for the block of a kernel that is used in several
        places of one example (Eschenhagen et al. 2023). "expand": the places
        are like examples of their own; "reduce": the block of their sums.
      spatial: for "kfra", "joint" to carry one matrix over all entries of a
        value, or "homogeneous" to let all positions share the matrix of the
        channels, for convolutions and long sequences (see `kfgn.curvature.channels`).
      model_examples: the number of examples, spread evenly over the batch, that
        stand for it in the quadratic model's Gauss-Newton matrix, whose cost
        they set (Martens & Grosse 2015, section 8); None takes the whole batch.
      unassigned: "raise" if a parameter belongs to no layer; "diagonal" to
        compute the exact diagonal of the Gauss-Newton matrix for it, at the
        cost of one backward pass per column of the output Hessian's root;
        "gradient" to leave it without curvature.

    Raises:
      OptionError: an unknown option, samples below 1, or no key for "kfac".
      LayerError: a parameter belongs to no layer.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.
    """
    chosen = check_method(method, samples)
    check_sharing(sharing)
    _check_spatial(spatial, chosen)
    _check_examples(model_examples)
    check_unassigned(unassigned)
    require_objective(objective)
    l2 = float(objective.l2) if isinstance(objective.l2, numbers.Real) else None
    settings = CurvatureSettings(method, samples, sharing, spatial, model_examples, unassigned, l2)

    def curvature_fn(params, batch, *, key=None):
        chosen.check_key(key)
        inputs, targets = check_batch(batch)
        graph = build_graph(objective, params, inputs)
        if unassigned == "raise":
            require_blocks(graph.reasons)
        model = linearize(graph, objective, params, inputs, targets, chosen.probes)
        moments = chosen.moments(Request(model, samples, sharing, spatial, key))
        factors: dict[str, Factors | Diagonal] = {}
        for name, layer in graph.layers.items():
            values = {n: model.values[use.input] for n, use in layer.uses.items()}
            activation = activation_moments(layer, values, sharing, model.dtype)
            factors[name] = assemble(layer, activation, moments[name])
        if unassigned == "diagonal" and graph.reasons:
            factors.update(_diagonals(model, inputs))
        value, gradient = _value_and_gradient(model, objective, params)
        push, *pushed = model.quadratic(inputs, model_examples)
        curvature = Curvature(
            factors,
            value,
            gradient,
            push,
            Partial(_OutputProduct(objective.loss), *pushed),
            Partial(_Displaced(objective), params, batch),
            settings,
        )
        return (value, with_leaves(params, gradient)), curvature

    return curvature_fn


def check_method(method: str, samples: int = 1) -> Method:
    """The method; raises OptionError for an unknown one or a number of samples below 1."""
    chosen = method_of(method)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise OptionError(f"samples must be an integer of at least 1, found {samples!r}")
    return chosen


def check_unassigned(unassigned: str) -> None:
    """Raises OptionError unless it is a known treatment of parameters without a block."""
    if unassigned not in UNASSIGNED:
        raise OptionError(
            f"unassigned must be one of {', '.join(UNASSIGNED)}, found {unassigned!r}"
        )


def _check_spatial(spatial: str, method: Method) -> None:
    every = dict.fromkeys(s for known in METHODS.values() for s in known.spatial)
    if spatial not in every:
        raise OptionError(f"spatial must be one of {', '.join(every)}, found {spatial!r}")
    if spatial not in method.spatial:
        able = ", ".join(f'"{m.name}"' for m in METHODS.values() if spatial in m.spatial)
        raise OptionError(f"spatial is an option of method {able}, not of {method.name!r}")


def _check_examples(examples: Any) -> None:
    whole = isinstance(examples, int) and not isinstance(examples, bool) and examples >= 1
    if examples is not None and not whole:
        raise OptionError(
            f"model_examples must be None or an integer of at least 1, found {examples!r}"
        )


def _value_and_gradient(
    model: Linearized, objective: Objective, params: PyTree
) -> tuple[Array, dict[str, Array]]:
    loss = mean_of(jax.vmap(model.loss)(model.outputs, model.targets))
    value = loss + objective.penalty(params).astype(loss.dtype)
    cotangent = model.loss.gradients(model.outputs, model.targets) / model.examples
    gradient, _ = model.pull(cotangent)
    return value, {
        name: g + jnp.asarray(objective.l2, g.dtype) * model.params[name]
        for name, g in gradient.items()
    }


def _diagonals(model: Linearized, inputs: PyTree) -> dict[str, Factors | Diagonal]:
    """The exact diagonal of the Gauss-Newton matrix for every parameter in no layer.

    `sum_k E[(J'c_k)^2]` over the columns c_k of the output Hessian's root: each
    example sees a copy of the parameters, whose gradients are so its own.
    """

    def outputs_of(own, example):
        batch = jax.tree.map(lambda a: a[None], example)
        outputs, _ = model.graph.forward({**model.params, **own}, batch)
        return jax.tree.map(lambda a: a[0], outputs)

    copies = {
        name: jnp.broadcast_to(model.params[name], (model.examples, *model.params[name].shape))
        for name in model.graph.reasons
    }
    _, pull = jax.vjp(lambda own: jax.vmap(outputs_of)(own, inputs), copies)
    count, column = model.loss.sqrt_columns(model.outputs, model.targets)

    def squares(index):
        (gradients,) = pull(as_outputs(column(index), model.outputs))
        return {
            name: Diagonal(jnp.mean(jnp.square(g.astype(model.dtype)), axis=0))
            for name, g in gradients.items()
        }

    return dict(sum_of_examples(squares, jnp.arange(count)))


# Callables with static data only: they compare equal when their data does, as
# the tree structure of a Partial must.


@dataclasses.dataclass(frozen=True)
class _OutputProduct:
    loss: Loss

    def __call__(self, outputs: PyTree, targets: PyTree, u: Array, v: Array) -> Array:
        product = jax.vmap(self.loss.gauss_newton_product)(outputs, targets, v)
        return inner(u, product) / u.shape[0]


@dataclasses.dataclass(frozen=True)
class _Displaced:
    objective: Objective

    def __call__(self, params: PyTree, batch: Any, direction: dict[str, Array]) -> Array:
        moved = {
            name: leaf + direction[name].astype(jnp.result_type(leaf))
            for name, leaf in named_leaves(params).items()
            if name in direction
        }
        return self.objective(with_leaves(params, moved), batch)
