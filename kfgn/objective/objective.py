"""The objective: a model, a per-example loss, and an l2 penalty.

f(params) = (1/N) sum_n ω_n E(model(params, x_n), y_n) + l2/2 |params|^2,   ω_n = 1 or `weights`
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_choice, check_flag, check_not_negative
from kfgn.base.devices import AxisName, count_over_devices, in_auto_axes
from kfgn.base.errors import BatchError, ModelError, OptionError, ParameterError
from kfgn.base.linalg import count_of, factor_dtype, inner
from kfgn.base.trees import batch_of, first_of, named_leaves, path_name
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.objective.loss import Loss, from_function
from kfgn.objective.weights import as_weights, loss_of, weigh


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The mean loss of a model over a batch, plus `l2/2 |params|^2`.

    Args:
      model: `(params, inputs) -> outputs`, any JAX function of a params pytree;
        inputs and outputs have a leading batch axis and may be pytrees.
      loss: one of `kfgn.losses`; a plain `(outputs, target) -> scalar` function
        of one example is taken through `kfgn.losses.from_function`.
      l2: the weight η of the penalty (appendix C).
      axis_name: the name of an axis over the examples, for models that take statistics of
        the batch by `jax.lax.pmean` and the like, as `BatchNorm(axis_name="batch")` does. The
        model then runs under it on batches of one, as under `jax.vmap`. Value and gradient
        are exact; in all curvature the statistics count as constants (see
        `kfgn.model.flatten.named_axis`).
      has_aux: whether the model returns `(outputs, aux)`, as in `jax.value_and_grad`; the aux
        comes back from `kfgn.value_grad_and_curvature`.
      mean_over: of a weighted batch, `(inputs, targets, weights)`, the mean is
        `sum_n w_n E_n / sum_n |w_n|`, over "weights", or `sum_n w_n E_n / N`, over "examples".
        Masks are weights 0 and 1. Factors and the quadratic model have `|w_n|`.

    Calling it with `(params, (inputs, targets))` gives the scalar objective, without aux.

    Raises:
      OptionError: the model is no function, l2 is negative or not finite, or mean_over unknown.
      BatchError, ModelError, LossError: where it is called, the input does not fit.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: x @ p, kfgn.losses.half_squared_error, l2=0.5)
    >>> params, inputs, targets = jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.zeros((4, 2))
    >>> float(objective(params, (inputs, targets)))
    10.5
    >>> float(objective(params, (inputs.at[3].set(jnp.nan), targets, jnp.array([1, 2, 3, 0]))))
    10.5
    """

    model: Callable[[PyTree, PyTree], PyTree]
    loss: Loss
    l2: float = 0.0
    axis_name: Hashable | None = None
    has_aux: bool = False
    mean_over: str = "weights"

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise OptionError(
                f"model must be a function (params, inputs) -> outputs, found {type(self.model)}; "
                "pass model.apply for a flax module."
            )
        if not isinstance(self.loss, Loss):
            object.__setattr__(self, "loss", from_function(self.loss))
        check_not_negative("l2", self.l2)
        check_flag("has_aux", self.has_aux)
        check_choice("mean_over", self.mean_over, ("weights", "examples"))

    def __call__(self, params: PyTree, batch: Batch | None = None) -> Scalar:
        if batch is None:
            raise BatchError(
                "an objective is called as objective(params, batch), found no batch; optax's line "
                "searches take it from update(..., batch=batch), and optax.inject_hyperparams, "
                'which calls all that is callable, needs static_args="objective"'
            )

        def value(params: PyTree, batch: Batch) -> Scalar:
            return self.mean_loss(params, batch) + self.penalty(params)

        return in_auto_axes(value)(params, batch)

    def mean_loss(self, params: PyTree, batch: Batch) -> Scalar:
        """The mean per-example loss over the batch, without the penalty."""
        inputs, targets = read_batch(self, batch)
        outputs = self.outputs(params, inputs)
        loss = loss_of(self.loss, targets)
        check_outputs(loss, outputs, inputs, targets)
        return mean_of(jax.vmap(loss)(outputs, targets))

    def outputs(self, params: PyTree, inputs: PyTree) -> PyTree:
        """The model's outputs on a batch, without aux."""
        if self.axis_name is None:
            return self.run(params, inputs)[0]

        def one(example: PyTree) -> PyTree:
            return first_of(self.run(params, batch_of(example))[0])

        return jax.vmap(one, axis_name=self.axis_name)(inputs)

    def run(self, params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """What the model returns where it is called, `(outputs, aux)`; aux is None without."""
        found = self.model(params, inputs)
        if not self.has_aux:
            return found, None
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise ModelError(
                "with has_aux=True the model must return a pair (outputs, aux), found a "
                f"{type(found).__name__}"
            )
        return found[0], found[1]

    def penalty(self, params: PyTree) -> Scalar:
        """`l2/2 |params|^2`."""
        return 0.5 * self.l2 * inner(params, params)

    def like_terms(self, found: dict[str, Any]) -> Any:
        """What was found for the one term that this is, where a sum has several."""
        (only,) = found.values()
        return only

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The one loss; of a sum of objectives that of every term."""
        return (self.loss,)

    def with_model(self, change: Callable[[Any], Any]) -> "Objective":
        """The same objective of another model, `change(model)`."""
        return dataclasses.replace(self, model=change(self.model))


def mean_of(losses: Float[Array, " N"]) -> Scalar:
    """The mean of per-example losses, in at least float32: steps compare such means."""
    return jnp.mean(losses, dtype=factor_dtype(losses.dtype))


def read_batch(
    objective: Objective, batch: Any, axis_name: AxisName | None = None
) -> tuple[PyTree, PyTree]:
    """The inputs and targets of a batch, whose leaves share one leading axis.

    Those of a weighted batch are `Weighted`; together they are a batch again, with the
    weights of the whole, of which parts may be taken.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        found = f"a {type(batch).__name__}"
        if isinstance(batch, (tuple, list)):
            found += f" of length {len(batch)}"
        raise BatchError(
            f"expected batch = (inputs, targets) or (inputs, targets, weights), found {found}; "
            "for an autoencoder pass (inputs, inputs)"
        )
    inputs, targets, *others = batch
    if not jax.tree.leaves(inputs):
        raise BatchError("the batch has no inputs: expected arrays with a leading batch axis")
    sizes = {}
    for part, tree in (("inputs", inputs), ("targets", targets)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = "/".join(filter(None, (part, path_name(path))))
            shape = jnp.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
            if not shape:
                raise BatchError(
                    f"{name} is a scalar (a {type(leaf).__name__}); expected an array with a "
                    "leading batch axis"
                )
            sizes[name] = shape[0]
    if len(set(sizes.values())) != 1:
        raise BatchError(
            "inputs and targets differ in their number of examples: "
            + ", ".join(f"{name} has {size}" for name, size in sizes.items())
        )
    if 0 in sizes.values():
        raise BatchError("the batch is empty: expected at least one example")
    if not others or others[0] is None:
        return inputs, targets
    _check_weights(others[0], count_of(inputs))
    statistics = objective.axis_name is not None
    return weigh(inputs, targets, others[0], objective.mean_over, axis_name, statistics)


def examples_of(objective: Objective, batch: Any, axis_name: AxisName | None) -> Scalar | int:
    """What the mean of a batch is over: how many examples, or the sum of `|w|`."""
    inputs, _, *weights = batch
    if objective.mean_over == "examples" or not weights or weights[0] is None:
        return count_over_devices(count_of(inputs), axis_name)
    if isinstance(weights[0], jax.ShapeDtypeStruct):
        return jnp.zeros(())
    size = jnp.sum(jnp.abs(as_weights(weights[0])))
    return size if axis_name is None else jax.lax.psum(size, axis_name)


def _check_weights(weights: Any, count: int) -> None:
    """Raises BatchError unless there is one finite number for each example."""
    shape, dtype = getattr(weights, "shape", None), getattr(weights, "dtype", None)
    numeric = dtype is not None and any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)
    )
    if shape != (count,) or not numeric:
        found = f"a {type(weights).__name__}" if shape is None else f"shape {shape}, dtype {dtype}"
        raise BatchError(
            f"weights must be a real array with one number for each of the {count} examples, shape "
            f"({count},), found {found}; weights of positions belong into the loss, as "
            "with_options(ignore_index=...) of kfgn.losses or a mask among the targets."
        )
    if is_concrete(weights):
        with jax.ensure_compile_time_eval():
            bad = ~jnp.isfinite(jnp.asarray(weights))
            if bool(jnp.any(bad)):
                index = int(jnp.argmax(bad))
                raise BatchError(f"weights must be finite, found {weights[index]} at {index}")


def check_outputs(loss: Loss, outputs: PyTree, inputs: PyTree, targets: PyTree) -> None:
    """Checks the model's outputs against the batch and the loss's domain."""
    count = count_of(inputs)
    if not jax.tree.leaves(outputs):
        raise ModelError("the model returned no outputs; expected arrays `[batch, ...]`")
    for leaf in jax.tree.leaves(outputs):
        if leaf.ndim == 0 or leaf.shape[0] != count:
            raise ModelError(
                f"the model returned outputs of shape {leaf.shape} for a batch of {count} "
                "examples; expected the leading axis to be the batch."
            )
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), outputs)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), targets)
    loss.check_shapes(example, target)
    if all(is_concrete(leaf) for leaf in jax.tree.leaves((outputs, targets))):
        loss.check_targets(outputs, targets)


def is_concrete(leaf: Any) -> bool:
    """Whether a leaf has values that can be looked at."""
    return not isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct))


def require_batch(objective: Objective, params: PyTree, batch: Batch) -> tuple[PyTree, PyTree, Any]:
    """The inputs and targets of a batch and the shapes of its outputs, checked.

    Raises:
      BatchError, ModelError, LossError: the batch, outputs and loss do not fit.
    """
    inputs, targets = read_batch(objective, batch)
    outputs = jax.eval_shape(objective.outputs, params, inputs)
    loss = loss_of(objective.loss, targets)
    check_outputs(loss, outputs, inputs, targets)
    if all(is_concrete(leaf) for leaf in jax.tree.leaves(targets)):
        with jax.ensure_compile_time_eval():  # also where the batch is a constant of a jit
            loss.check_targets(outputs, targets)
    return inputs, targets, outputs


def check_vector(params: PyTree, vector: PyTree) -> None:
    """Raises ParameterError where a vector has another structure, shape or dtype than params."""
    expected: Any = jax.tree.structure(params)
    found: Any = jax.tree.structure(vector)
    if expected != found:
        raise ParameterError(f"the vector must be a pytree like params, {expected}, found {found}")
    pairs = zip(named_leaves(params).items(), jax.tree.leaves(vector), strict=True)
    for (name, leaf), entry in pairs:
        wanted, given = ((jnp.shape(x), jnp.result_type(x)) for x in (leaf, entry))
        if wanted != given:
            raise ParameterError(
                f"the vector's entry {name!r} must have shape {wanted[0]} and dtype {wanted[1]}, "
                f"as in params, found shape {given[0]} and dtype {given[1]}"
            )
