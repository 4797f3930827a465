"""What travels to `update` by keyword: what transformations need of it, and may not see."""

from __future__ import annotations

from typing import Any

import jax
import optax

from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.types import Batch, PyTree


def whole_params(name: str, params: PyTree, batch: Batch, all_params: PyTree) -> PyTree:
    """All parameters, for a transformation that evaluates the objective on a batch.

    In `optax.masked` and `optax.partition` params have placeholders for those
    that are masked out, with which no objective can be called: it takes them
    from `all_params`, which the wrappers hand on as it is.

    Raises:
      OptionError: params or the batch are missing.
      ParameterError: some params are masked out, and `all_params` is missing.
    """
    if params is None or batch is None:
        raise OptionError(
            f"{name} needs params and the batch: call update(grads, state, params, batch=batch), "
            "beside what else it takes"
        )
    if all_params is not None:
        return all_params
    if has_masked(params):
        raise ParameterError(
            f"{name} evaluates the objective, a function of all parameters, but some are masked "
            "out here: pass them as well, update(grads, state, params, batch=batch, "
            "all_params=params). Those masked out stay fixed in it."
        )
    return params


def has_masked(tree: PyTree) -> bool:
    """Whether optax has put placeholders for some leaves."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_masked)
    return any(map(_is_masked, leaves))


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def without_curvature(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, with the keyword arguments `curvature` and `all_params` kept from it.

    optax's line searches refuse keyword arguments that their `value_fn` does
    not take; wrapped, they can stand in a chain after kfgn's transformations.

    Args:
      transformation: any of optax's.

    Raises:
      OptionError: it is no optax transformation.

    >>> import optax
    >>> search = without_curvature(optax.scale_by_backtracking_linesearch(10))
    >>> tx = optax.chain(optax.scale(-1.0), search)  # takes curvature= beside value_fn=
    """
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        kind = type(transformation).__name__
        raise OptionError(f"expected an optax transformation, found a {kind}")
    inside = optax.with_extra_args_support(transformation)

    def update(updates, state, params=None, *, curvature=None, all_params=None, **extra):
        del curvature, all_params
        return inside.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inside.init, update)
