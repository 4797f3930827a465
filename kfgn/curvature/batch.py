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
from kfgn.base.linalg import inner
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.channels import summed_over_positions, walk_channels
from kfgn.curvature.factors import (
    Diagonal,
    Factors,
    Moments,
    activation_moments,
    assemble,
    check_sharing,
    gradient_moments,
    over_places,
    walked_moments,
)
from kfgn.curvature.forward_pass import Linearized, as_outputs, linearize
from kfgn.curvature.recursion import Walk, walk_back
from kfgn.model.graph import build_graph
from kfgn.model.layer import require_blocks
from kfgn.objective.loss import Loss
from kfgn.objective.objective import Objective, check_batch, mean_of, require_objective

Array = jax.Array
PyTree = Any

METHODS = ("kfra", "kflr", "kfac", "empirical")
# What the recursion of "kfra" carries where a value has positions.
SPATIAL = ("joint", "homogeneous")
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
    check_method(method, samples)
    check_sharing(sharing)
    _check_spatial(spatial, method)
    _check_examples(model_examples)
    check_unassigned(unassigned)
    require_objective(objective)
    l2 = float(objective.l2) if isinstance(objective.l2, numbers.Real) else None
    settings = CurvatureSettings(method, samples, sharing, spatial, model_examples, unassigned, l2)

    def curvature_fn(params, batch, *, key=None):
        _check_key(method, key)
        inputs, targets = check_batch(batch)
        graph = build_graph(objective, params, inputs)
        if unassigned == "raise":
            require_blocks(graph.reasons)
        model = linearize(graph, objective, params, inputs, targets, method != "kfra")
        gradients = _pre_activation_moments(model, method, samples, sharing, spatial, key)
        factors: dict[str, Factors | Diagonal] = {}
        for name, layer in graph.layers.items():
            values = {n: model.values[use.input] for n, use in layer.uses.items()}
            activation = activation_moments(layer, values, sharing, model.dtype)
            factors[name] = assemble(layer, activation, gradients[name])
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


def check_method(method: str, samples: int = 1) -> None:
    """Raises OptionError for an unknown method or a number of samples below 1."""
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise OptionError(f"samples must be an integer of at least 1, found {samples!r}")


def check_unassigned(unassigned: str) -> None:
    """Raises OptionError unless it is a known treatment of parameters without a block."""
    if unassigned not in UNASSIGNED:
        raise OptionError(
            f"unassigned must be one of {', '.join(UNASSIGNED)}, found {unassigned!r}"
        )


def _check_spatial(spatial: str, method: str) -> None:
    if spatial not in SPATIAL:
        raise OptionError(f"spatial must be one of {', '.join(SPATIAL)}, found {spatial!r}")
    if spatial != "joint" and method != "kfra":
        raise OptionError(f'spatial is an option of method "kfra", not of {method!r}')


def _check_examples(examples: Any) -> None:
    whole = isinstance(examples, int) and not isinstance(examples, bool) and examples >= 1
    if examples is not None and not whole:
        raise OptionError(
            f"model_examples must be None or an integer of at least 1, found {examples!r}"
        )


def _check_key(method: str, key: Any) -> None:
    if method == "kfac" and key is None:
        raise OptionError(
            'method "kfac" samples targets and needs a random key: call it as '
            "curvature_fn(params, batch, key=jax.random.key(0)), a new key for each batch."
        )
    if method != "kfac" and key is not None:
        raise OptionError(f"method {method!r} draws nothing: call it without key=")


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


def _pre_activation_moments(
    model: Linearized, method: str, samples: int, sharing: str, spatial: str, key: Array | None
) -> dict[str, Moments]:
    """G of every layer."""
    loss, outputs, targets, layers = model.loss, model.outputs, model.targets, model.graph.layers
    if method == "kfra":
        sums = _recursion(model, sharing, spatial)
        return {name: walked_moments(layer, sums, sharing) for name, layer in layers.items()}

    def moments(column: Array) -> dict[str, Moments]:
        _, cotangents = model.pull(column)
        return {
            name: gradient_moments(
                layer, {n: cotangents[n] for n in layer.uses}, sharing, model.dtype
            )
            for name, layer in layers.items()
        }

    if method == "kflr":
        count, column = loss.sqrt_columns(outputs, targets)
        return _summed(lambda k: moments(column(k)), jnp.arange(count))
    if method == "kfac":
        assert key is not None  # checked on entry
        keys = jax.random.split(key, samples)
        total = _summed(lambda k: moments(loss.sampled_gradients(k, outputs)), keys)
        return jax.tree.map(lambda x: x / samples, total)
    return moments(loss.gradients(outputs, targets))


def _recursion(model: Linearized, sharing: str, spatial: str) -> dict[str, Array]:
    """What the mean matrix leaves at every use, summed over its places."""
    graph = model.graph
    hessian = model.loss.mean_hessian(model.outputs, model.targets).astype(model.dtype)
    walk = Walk(graph, graph.shared_values(model.params), model.values)
    layer_of = {name: layer for layer in graph.layers.values() for name in layer.uses}
    if spatial == "homogeneous":
        found = walk_channels(walk, hessian)
        return {n: summed_over_positions(u, *found[n]) for n, u in graph.uses.items()}
    matrices = walk_back(walk, hessian).uses
    return {n: over_places(layer_of[n], u, matrices[n], sharing) for n, u in graph.uses.items()}


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

    return dict(_summed(squares, jnp.arange(count)))


def _summed(function: Callable[[Array], Any], items: Array) -> Any:
    """The sum of a function's results, one item at a time."""
    if items.shape[0] == 1:
        return function(items[0])
    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct(items.shape[1:], items.dtype))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, item):
        return jax.tree.map(jnp.add, total, function(item)), None

    return jax.lax.scan(add, start, items)[0]


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
