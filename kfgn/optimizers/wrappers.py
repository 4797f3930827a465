"""How optax calls a transformation: by leaves' names, and with what keyword arguments."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from kfgn.base.checks import check_whole
from kfgn.base.devices import replicated
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, Named, PyTree
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature, require_settings
from kfgn.optimizers.skipped import count_streak
from kfgn.optimizers.state import check_state


def by_curvature(
    kind: type,
    blocks: LayerBlocks,
    init: Callable[[Named], Any],
    advance: Callable[..., tuple[Named, Any]],
    warn_after_skipped: int | Array | None = 10,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of updates that need the curvature of a batch.

    Args:
      kind: of its state.
      blocks: the layers that the curvature must have factors of.
      init: `leaves -> state`, of leaves by their names.
      advance: `(state, gradient, curvature, params=, **others) -> (step, state)`, likewise,
        `others` being what else is given to the update by keyword.
      warn_after_skipped: how many skipped updates in a row are said; None for never.
      settings: that the curvature must have been made with.
    """
    if warn_after_skipped is not None:
        check_whole("warn_after_skipped", warn_after_skipped, 1, traced=True)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        curvature: Curvature | None = None,
        **others: Any,
    ) -> tuple[PyTree, Any]:
        check_state(state, kind)
        gradient = replicated(named_leaves(updates))
        curvature = require_curvature(curvature, blocks, gradient)
        require_settings(curvature, **settings)
        if isinstance(_factors(state), dict):
            blocks.check_seen(gradient, state.factors)
        expected = jax.eval_shape(init, gradient)
        trees: Any = [jax.tree.structure(x) for x in (state, expected)]
        if trees[0] != trees[1]:
            raise OptionError(
                f"the {kind.__name__} was made with other options, such as momentum or inverse, or "
                "for other parameters: to change them in mid-run begin with a new state, "
                "optimizer.init(params)"
            )
        shapes = ([x.shape for x in jax.tree.leaves(_factors(s))] for s in (state, expected))
        for found, wanted in zip(*shapes, strict=True):
            if found != wanted:
                raise OptionError(
                    f"the state has a stack of factors of shape {found}, expected {wanted}: with "
                    "factor_sharding make or restore it for this number of devices, and give "
                    "jax.shard_map its own shardings as specs"
                )
        params = replicated(params)
        step, moved = advance(state, gradient, curvature, params=params, **others)
        return with_leaves(updates, step), count_streak(state, moved, warn_after_skipped)

    def start(params: PyTree) -> Any:
        return init(replicated(named_leaves(params)))

    return optax.GradientTransformationExtraArgs(start, update)


def _factors(state: Any) -> Any:
    return getattr(state, "factors", None)


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

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(masked, jax.tree.leaves(tree, is_leaf=masked)))


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

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        curvature: Curvature | None = None,
        all_params: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, Any]:
        del curvature, all_params
        return inside.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inside.init, update)
