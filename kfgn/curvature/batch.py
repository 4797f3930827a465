"""Value, gradient and Kronecker factors of an objective from one forward pass."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float

from kfgn.base.checks import check_choice, check_whole
from kfgn.base.devices import (
    AxisName,
    count_over_devices,
    in_auto_axes,
    mean_over_devices,
    part_of_device,
    vary_like,
)
from kfgn.base.errors import OptionError
from kfgn.base.linalg import count_of, inner
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.curvature.factors import (
    Diagonal,
    Factors,
    activation_moments,
    assemble,
    check_sharing,
)
from kfgn.curvature.forward_pass import Linearized, linearize
from kfgn.curvature.methods import METHODS, Request, method_of
from kfgn.curvature.own_factors import own_factors
from kfgn.model.carried import carry
from kfgn.model.factor_size import check_factor_size, limited
from kfgn.model.graph import build_graph
from kfgn.model.layer import require_blocks
from kfgn.objective.loss import Loss
from kfgn.objective.objective import Objective, mean_of, read_batch, require_objective
from kfgn.objective.weights import as_weights, importance


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CurvatureSettings:
    """What a curvature was made with: the arguments of `value_grad_and_curvature`.

    A pytree without leaves: it is part of the tree structure of a `Curvature`.

    Raises:
      OptionError: an option has a wrong value.

    >>> import kfgn
    >>> settings = kfgn.curvature.CurvatureSettings(
    ...     "kfac", 1, "expand", "joint", 256, "raise", l2=0.0
    ... )
    >>> jax.tree.leaves(settings)
    []
    """

    method: str
    samples: int
    sharing: str
    spatial: str
    model_examples: int | None
    unassigned: str
    l2: float | None  # the objective's; None where it is an array, whose value may be unknown
    large_factors: str = "raise"
    factor_limit: int | None = None

    def __post_init__(self) -> None:
        method = method_of(self.method)
        check_whole("samples", self.samples, 1)
        check_sharing(self.sharing)
        check_choice("spatial", self.spatial, {s: 0 for m in METHODS.values() for s in m.spatial})
        if self.spatial not in method.spatial:
            able = ", ".join(f'"{n}"' for n, m in METHODS.items() if self.spatial in m.spatial)
            raise OptionError(f"spatial is an option of method {able}, not of {self.method!r}")
        if self.model_examples is not None:
            check_whole("model_examples", self.model_examples, 1)
        check_unassigned(self.unassigned)
        check_factor_size(self.large_factors, self.factor_limit)

    def require_equal(self, other: "CurvatureSettings", what: str) -> None:
        """Raises OptionError where other settings differ, with the fields that do."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        differing = [n for n in mine if mine[n] != others[n]]
        if differing:
            found = ", ".join(f"{n}={mine[n]!r} and {n}={others[n]!r}" for n in differing)
            raise OptionError(
                f"{what} must have the same settings, found {found}; make all of them with one "
                "function of kfgn.value_grad_and_curvature."
            )


class Curvature(NamedTuple):
    """Everything an update needs to know about a batch, as one pytree.

    The callables are `jax.tree_util.Partial`, so all of it crosses jit.
    Directions are dictionaries from parameter name to array; absent names
    stand for zeros.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 1)), (jnp.ones((4, 3)), jnp.zeros((4, 1)))
    >>> _, curvature = kfgn.value_grad_and_curvature(objective, "kflr")(w, batch)
    >>> float(curvature.value), float(curvature.displaced({"": -w}))
    (4.5, 0.0)
    >>> curvature.linearized({"": w}).shape, curvature.settings.method
    ((4, 1), 'kflr')
    """

    factors: dict[str, Factors | Diagonal]  # by layer; diagonals by parameter
    value: Scalar  # the objective, l2 included
    gradient: dict[str, Array]  # its gradient, l2 included
    # Of all examples, or of the `model_examples` that stand for them, n:
    linearized: Partial  # direction -> the outputs' change to first order, `[n, K]`
    output_product: Partial  # (u, v) of `[n, K]` -> mean of u'Hv, H the output Hessian
    displaced: Partial  # direction -> the objective at params + direction
    examples: Scalar  # how many the batch has, or the sum of `|w|`: its weight in an average
    settings: CurvatureSettings  # static: what it was made with


def value_grad_and_curvature(
    objective: Objective,
    method: str = "kfra",
    *,
    samples: int = 1,
    sharing: str = "expand",
    spatial: str = "joint",
    model_examples: int | None = 256,
    unassigned: str = "block",
    large_factors: str = "raise",
    factor_limit: int | None = None,
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
        they set (Martens & Grosse 2015, section 8); None takes the whole batch.
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
        *(large_factors, factor_limit),
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
        inputs, targets = read_batch(objective, batch, axis_name)
        read, data = carry(objective, params, inputs)
        graph = build_graph(read, params, data)
        require_blocks(graph.without_block(unassigned))
        layers = limited(graph.layers, large_factors, factor_limit)
        graph = dataclasses.replace(graph, layers=layers)
        known = vary_like((params, inputs, targets, data), (params, batch))
        params, inputs, targets, data = known
        model = linearize(graph, read, params, data, targets, chosen.probes)
        weights = importance(targets, axis_name)
        request = Request(model, samples, sharing, spatial, key, axis_name, weights)
        moments = chosen.moments(request)
        factors: dict[str, Factors | Diagonal] = {}
        for name, layer in graph.layers.items():
            values = {n: model.values[use.input] for n, use in layer.uses.items()}
            activation = activation_moments(
                layer, values, sharing, model.dtype, model.weights, weights
            )
            both = mean_over_devices((activation, moments[name]), axis_name)
            factors[name] = assemble(layer, *both)
        if unassigned in ("diagonal", "block") and graph.reasons:
            own = own_factors(model, whole=unassigned == "block")
            factors.update(mean_over_devices(own, axis_name))
        pair = _value_and_gradient(model, objective, params)
        value, gradient = mean_over_devices(pair, axis_name)
        count = part_of_device(model_examples, axis_name)
        push, *pushed = model.quadratic(objective, params, count)
        curvature = Curvature(
            factors,
            value,
            gradient,
            push,
            Partial(_OutputProduct(model.loss, axis_name), *pushed),
            Partial(_Displaced(objective, axis_name), params, (inputs, targets)),
            _examples(objective, batch, axis_name).astype(value.dtype),
            settings,
        )
        first = (value, model.aux) if objective.has_aux else value
        return (first, with_leaves(params, gradient)), curvature

    return curvature_fn


def _examples(objective: Objective, batch: Batch, axis_name: AxisName | None) -> Scalar:
    """What a batch's mean is over."""
    inputs, _, *weights = batch
    if objective.mean_over == "examples" or not weights or weights[0] is None:
        return jnp.asarray(count_over_devices(count_of(inputs), axis_name))
    size = jnp.sum(jnp.abs(as_weights(weights[0])))
    return size if axis_name is None else jax.lax.psum(size, axis_name)


def check_unassigned(unassigned: str) -> None:
    """Raises OptionError unless it is a known treatment of parameters without a block."""
    check_choice("unassigned", unassigned, ("block", "raise", "diagonal", "gradient"))


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

    def __call__(self, params: PyTree, batch: Batch, direction: dict[str, Array]) -> Scalar:
        moved = {
            name: leaf + direction[name].astype(jnp.result_type(leaf))
            for name, leaf in named_leaves(params).items()
            if name in direction
        }
        value = self.objective(with_leaves(params, moved), batch)
        return mean_over_devices(value, self.axis_name)
