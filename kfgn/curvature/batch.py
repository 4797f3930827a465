"""Value, gradient and Kronecker factors of an objective from one forward pass."""

import dataclasses
import functools
import numbers
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.devices import (
    AxisName,
    in_auto_axes,
    mean_over_devices,
    part_of_device,
    vary_like,
)
from kfgn.base.linalg import congruence_diagonal, inner, products_at
from kfgn.base.trees import check_direction, named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.curvature.activations import Inputs, activation_moments, examples_for
from kfgn.curvature.averaging import bases_of_term, summed
from kfgn.curvature.basis_moments import Basis
from kfgn.curvature.convolutions import any_turned, in_order
from kfgn.curvature.curvature import Curvature, CurvatureSettings
from kfgn.curvature.factors import Diagonal, Factors, assemble
from kfgn.curvature.forward_pass import Linearized, linearize
from kfgn.curvature.ignored import routes
from kfgn.curvature.lazy_factors import lazily
from kfgn.curvature.methods import Request, method_of
from kfgn.curvature.own_factors import own_factors
from kfgn.model.graph.unite import Term, United, unite
from kfgn.model.layers.layer import Layer, require_blocks
from kfgn.objective.loss import Loss
from kfgn.objective.objective import Objective, mean_of
from kfgn.objective.sum_of import AnyObjective, SumOfObjectives, named_term, require_objective
from kfgn.objective.weights import importance, spread


def value_grad_and_curvature(
    objective: AnyObjective,
    method: str = "kfra",
    *,
    samples: int = 1,
    sharing: str = "expand",
    spatial: str = "joint",
    model_examples: int | None = 256,
    activation_rows: int | None = None,
    unassigned: str = "block",
    large_factors: str = "raise",
    factor_limit: int | None = None,
    precision: str = "highest",
    inverse: str = "factored",
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[tuple[Any, PyTree], Curvature]]:
    """A function `(params, batch) -> ((value, grads), curvature)`, from one forward pass.

    Of an objective with `has_aux`, it gives `((value, aux), grads), curvature`, as
    `jax.value_and_grad` does: aux per example with the batch's axis, the rest without.

    >>> import jax.numpy as jnp, kfgn
    >>> model = lambda p, x: jnp.tanh(x @ p["w"])
    >>> objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    >>> params, batch = {"w": jnp.ones((3, 2))}, (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> (value, grads), curvature = kfgn.value_grad_and_curvature(objective)(params, batch)
    >>> {name: factors.activation.shape for name, factors in curvature.factors.items()}
    {'w': (3, 3)}

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
      sharing: what stands for the block of a kernel that is applied at several
        positions of one example (Eschenhagen et al. 2023). "expand": the positions
        are like examples of their own; "reduce": the block of their sums.
      spatial: for "kfra", "joint" to carry one matrix over all entries of a
        value, or "homogeneous" to let all positions share the matrix of the
        channels, for convolutions and long sequences (see `kfgn.curvature.channels`).
      model_examples: the number of examples, spread evenly over the batch, that
        stand for it in the quadratic model's Gauss-Newton matrix, whose cost
        they set (Martens & Grosse 2015, section 8); None takes the whole batch, as does a
        number of more than half of it.
      activation_rows: Q of a kernel that is applied at several positions of an example is
        taken of no more examples, spread evenly over the batch, than have so many times
        as many positions as it has rows, and of 64 at least. It may be most of what the
        factors of convolutions cost. None takes the whole batch; `kfgn.make` says 4.
      unassigned: what a parameter in no layer gets, such as a kernel that is normalized.
        "block": the exact block of the Gauss-Newton matrix of its own, up to 1024 entries,
        at the cost of one backward pass per column of the output Hessian's root, else an
        error; "raise" for an error; "diagonal": the exact diagonal, at the same cost;
        "gradient" to leave it without curvature.
      large_factors: what becomes of factors with more rows than `factor_limit`: "raise";
        "split", into the fewest equal blocks on the diagonal that are not larger; or
        "diagonal". Q of look-ups is a diagonal anyway; that of an embedding tied to the
        output is then a diagonal, the counts of its rows and the output's share.
      factor_limit: None stands for the rows of a factor that takes 2 GiB.
      precision: of the products that form the factors, as `jax.lax.Precision` has them:
        "highest" is full float32; on accelerators "high" and "default" allow TF32 or
        bfloat16 passes, which are faster. Inversions are at the highest, the model's own
        products as JAX is told.
      inverse: that of the optimizer. "ekfac" alone asks for more than factors, of any method:
        second moments in their eigenbasis, over the method's columns or samples. The mean
        matrix of "kfra" has none: it takes those of "kflr", at their cost.
      axis_name: inside `jax.shard_map`, `jax.pmap` or a named `jax.vmap`, the axis of
        devices over which a batch is spread, or a tuple of them: value, gradient,
        curvature and what an update measures are then those of the whole batch, and
        the same on every device. Without it they are those of a device's own
        examples, also the gradient, which `jax.grad` sums over the devices in
        `shard_map` with `check_vma=True`; with "kfac" give each device a key of its own.
        Under `jit` alone, with a sharded batch, nothing is to be named.

    Raises:
      OptionError: an unknown option, samples below 1, or no key for "kfac".
      LayerError: a parameter belongs to no layer, or a factor is too large.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.
    """
    require_objective(objective)
    l2 = float(objective.l2) if isinstance(objective.l2, numbers.Real) else None
    settings = CurvatureSettings(
        *(method, samples, sharing, spatial, model_examples, unassigned, l2),
        *(large_factors, factor_limit, precision, inverse, activation_rows),
    )
    chosen = method_of(method)

    def curvature_fn(
        params: PyTree, batch: Batch, *, key: Array | None = None
    ) -> tuple[tuple[Any, PyTree], Curvature]:
        chosen.check_key(key)
        return in_auto_axes(of_batch)(params, batch, key)

    def of_batch(
        params: PyTree, batch: Batch, key: Array | None
    ) -> tuple[tuple[Any, PyTree], Curvature]:
        limits = large_factors, factor_limit
        united = unite(objective, params, batch, axis_name, *limits, chosen.walks)
        require_blocks(united.without_block(unassigned))
        found, aux = [], {}
        for k, (name, term) in enumerate(united.terms.items()):
            own = key if key is None or k == 0 else jax.random.fold_in(key, k)
            with named_term(name):
                curvature, aux[name] = _of_term(term, settings, params, own, axis_name, united)
            found.append(curvature)
        if isinstance(objective, SumOfObjectives):
            curvature = summed(found, united, settings)
        first = (
            (curvature.value, objective.like_terms(aux)) if objective.has_aux else curvature.value
        )
        return (first, with_leaves(params, curvature.gradient)), curvature

    return curvature_fn


def _of_term(
    term: Term,
    settings: CurvatureSettings,
    params: PyTree,
    key: Array | None,
    axis_name: AxisName | None,
    united: United,
) -> tuple[Curvature, PyTree]:
    objective, graph, known = term.objective, term.graph, (term.inputs, term.targets, term.data)
    params, inputs, targets, data = vary_like((params, *known), (params, known))
    method = method_of(settings.method)
    ekfac = settings.inverse == "ekfac"
    probes = method.probes or ekfac or term.objective.loss.ignores
    model = linearize(*(graph, term.read, params, data, targets), probes, method.walks)
    weights = importance(targets, axis_name)
    counted = {n: w.counted(weights, axis_name) for n, w in model.weights.items()}
    model = model._replace(weights=counted)
    request = Request(
        model, settings.samples, settings.sharing, settings.spatial, key, axis_name, weights
    )
    own = _value_and_gradient(model, objective, params)
    value, gradient = mean_over_devices(own, axis_name)
    count = part_of_device(settings.model_examples, axis_name)
    turned = any_turned(graph.model.jaxpr)
    push, *pushed = model.quadratic(objective, params, count)
    at_precision, lazy_moments = products_at(settings.precision), None
    if ekfac:
        of_bases = at_precision(functools.partial(_basis_moments, request, settings))
        lazy_moments = lazily(of_bases, bases_of_term(term, united, settings, model.dtype))
    curvature = Curvature(
        lazily(at_precision(lambda: _factors(request, settings))),
        value,
        gradient,
        push,
        Partial(_OutputProduct(model.loss, axis_name), *pushed),
        Partial(_Displaced(objective, axis_name, turned), params, (inputs, targets)),
        jnp.asarray(term.examples, value.dtype),
        settings,
        lazy_moments,
    )
    return curvature, model.aux


def _factors(request: Request, settings: CurvatureSettings) -> dict[str, Factors | Diagonal]:
    model, axis_name = request.model, request.axis_name
    routed = routes(request)
    moments = method_of(settings.method).moments(request)
    factors: dict[str, Factors | Diagonal] = {}
    for name, layer in model.graph.layers.items():
        seen = {n: _inputs(request, layer, n, settings, routed) for n in layer.uses}
        activation = activation_moments(layer, seen, request.sharing, model.dtype, model.weights)
        both = mean_over_devices((activation, moments[name]), axis_name)
        factors[name] = assemble(layer, *both)
    if settings.unassigned in ("diagonal", "block") and model.graph.reasons:
        lone = own_factors(model, whole=settings.unassigned == "block")
        factors.update(mean_over_devices(lone, axis_name))
    return factors


def _inputs(
    request: Request,
    layer: Layer,
    name: str,
    settings: CurvatureSettings,
    routed: dict[str, Array],
) -> Inputs:
    """What a use is applied to, of all examples or of as many as Q asks for."""
    use = layer.uses[name]
    model = request.model
    seen = model.values[use.input], routed.get(name)
    asked = examples_for(layer, use, settings.activation_rows, settings.sharing)
    few = part_of_device(asked, request.axis_name)
    if few is None or 2 * few > model.examples:
        return Inputs(seen[0], request.importance, seen[1])
    seen, targets = spread(seen, model.targets, few)
    return Inputs(seen[0], importance(targets, request.axis_name), seen[1])


def _basis_moments(
    request: Request, settings: CurvatureSettings, bases: dict[str, Basis]
) -> dict[str, Array]:
    method, model = method_of(settings.method), request.model
    of = functools.partial(request.column_basis_moments, bases)
    moments = method.over_columns(request, of)
    if settings.unassigned == "block" and model.graph.reasons:
        for name, own in own_factors(model, whole=True).items():
            if name in bases:  # else it is in a layer of the sum
                moments[name] = congruence_diagonal(cast(Array, bases[name][1]).T, own[-1])[None]
    return mean_over_devices(moments, request.axis_name)


def _value_and_gradient(
    model: Linearized, objective: Objective, params: PyTree
) -> tuple[Scalar, dict[str, Array]]:
    loss = mean_of(jax.vmap(model.loss)(model.outputs, model.targets))
    value = loss + objective.penalty(params).astype(loss.dtype)
    cotangent = model.loss.gradients(model.outputs, model.targets) / model.examples
    gradient = model.gradient(cotangent)
    return value, {
        name: g + jnp.asarray(objective.l2, g.dtype) * model.params[name]
        for name, g in gradient.items()
    }


# Callables with static data only: they compare equal when their data does, as
# the tree structure of a Partial must.


@dataclasses.dataclass(frozen=True)
class _OutputProduct:
    loss: Loss
    axis_name: AxisName | None

    def __call__(
        self, outputs: PyTree, targets: PyTree, u: Float[Array, "n K"], v: Float[Array, "n K"]
    ) -> Scalar:
        def product(outputs: PyTree, targets: PyTree, u: Array, v: Array) -> Scalar:
            curved = jax.vmap(self.loss.gauss_newton_product)(outputs, targets, v)
            return mean_over_devices(inner(u, curved) / u.shape[0], self.axis_name)

        return in_auto_axes(product)(outputs, targets, u, v)


@dataclasses.dataclass(frozen=True)
class _Displaced:
    objective: Objective
    axis_name: AxisName | None
    turned: bool  # whether convolutions are faster in another order, in loops

    def __call__(self, params: PyTree, batch: Batch, direction: dict[str, Array]) -> Scalar:
        check_direction(direction, named_leaves(params))
        moved = {
            name: leaf + direction[name].astype(jnp.result_type(leaf))
            for name, leaf in named_leaves(params).items()
            if name in direction
        }
        objective = in_order(self.objective) if self.turned else self.objective
        value = objective(with_leaves(params, moved), batch)
        return mean_over_devices(value, self.axis_name)
