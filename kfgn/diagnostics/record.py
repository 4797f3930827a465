"""What the last update did, out of any optimizer's state."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kfgn.base.errors import OptionError

# Of optax's wrappers, whose states are NamedTuples as well.
_OF_WRAPPERS = ("hyperparams", "gradient_step", "mini_step", "notfinite_count", "total_notfinite")


def record(state: Any) -> dict[str, Any]:
    """The numbers in an optimizer's state as a flat dictionary, for TensorBoard, wandb or a CSV.

    Of `kfgn.kfra`, `kflr` and `kfac` these are

        count, skipped, refused, still:  updates by what became of them
        skipped_in_a_row:                up to now
        loss, gradient_norm:             of the batch, l2 included
        step_size, momentum:             the coefficients of eq. (40), and of the previous step
        update_norm:                     of the step, before the learning rate; 0 if refused
        step_damping, factor_damping:    τ and γ
        reduction_ratio:                 ρ, eq. (42), actual_change / predicted_change as
                                         last measured, which is not at every update
        agreement:                       the part of a step that the next batches would have
                                         taken; 1 without momentum, see LevenbergMarquardt
        largest_eigenvalue, condition:   of the factors, and of the damped ones, at the last
                                         inversion: the largest over all layers; exact for
                                         inverse "eigen", else bounds by Frobenius norms
        observed:                        how often the average has seen factors, since it began
        refresh_factors_every, refresh_inverse_every, step_damping_period,
        factor_damping_period

    An update that is skipped leaves all but the counts as they were. Other
    transformations have those of these that they know, and their own.

    Args:
      state: of an optimizer, however it is wrapped: in `optax.chain`, `masked`,
        `partition`, `inject_hyperparams` (whose numbers are in the record), `MultiSteps`,
        `apply_if_finite`; a flax `TrainState` or an `nnx.Optimizer` that holds one.

    Returns:
      Python's numbers by name; arrays where there are several, as under
      `jax.vmap`, or where they are traced. Names that several transformations in the
      state have are preceded by where each stands, "0/skipped".

    Raises:
      OptionError: no state of kfgn's is in it.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> optimizer = kfgn.kfra(objective, w, batch)
    >>> (value, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> _, state = optimizer.update(grads, optimizer.init(w), w, curvature=curvature)
    >>> numbers = kfgn.diagnostics.record(state)
    >>> numbers["loss"], numbers["count"], numbers["skipped"]
    (1.0, 1, 0)
    """
    found = list(_numbers("", getattr(state, "opt_state", state)))
    if not any(own for own, *_ in found):
        raise OptionError(
            f"no state of one of kfgn's transformations is in the {type(state).__name__}: pass "
            "what optimizer.init or optimizer.update returned"
        )
    names = [name for _, _, name, _ in found]
    values = jax.tree.map(_readable, [value for *_, value in found])
    keys = [f"{at}{n}" if names.count(n) > 1 else n for _, at, n, _ in found]
    return dict(zip(keys, values, strict=True))


def _numbers(at: str, tree: Any) -> Iterator[tuple[bool, str, str, Any]]:
    """Whether it is kfgn's, the path of a transformation's state, a number's name, its value."""
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    own = _is_own(tree)
    for path, child in children:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if own and _is_own(child):
            yield from ((own, at, n, value) for _, _, n, value in _numbers(at, child))
        elif _is_number(child):
            if (own and name not in ("average", "alarm", "evidence")) or name in _OF_WRAPPERS:
                yield own, at, name, child
        elif name == "hyperparams":
            yield from ((own, at, n, value) for n, value in child.items() if _is_number(value))
        elif (not own or name == "inner") and child is not tree:
            yield from _numbers(f"{at}{name}/", child)


def _is_own(tree: Any) -> bool:
    return type(tree).__module__.startswith("kfgn.optimizers") and isinstance(tree, tuple)


def _is_number(child: Any) -> bool:
    """Whether it is one array, or a container of nnx that holds one."""
    return not isinstance(child, (tuple, dict, list)) and len(jax.tree.leaves(child)) == 1


def _readable(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return value
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array
