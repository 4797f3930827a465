"""One update for several micro-batches, with the factors of all of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_whole
from kfgn.base.linalg import factor_dtype
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, Named, PyTree, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.curvature.lazy_factors import known
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.state import (
    Count,
    all_finite,
    check_state,
    counter,
    is_usable,
    keep_if,
    number,
    zeros_like,
)


class MultiStepsState(NamedTuple):
    """State of `multi_steps`."""

    micro_batches: Count  # gathered since the last update
    examples: Scalar  # in them
    gathered: tuple[PyTree, Named, Named]  # means: what came in, the gradient, the factors
    inner: PyTree  # the optimizer's


def multi_steps(
    optimizer: optax.GradientTransformationExtraArgs, blocks: LayerBlocks, every: int | Array
) -> optax.GradientTransformationExtraArgs:
    """An update of the optimizer for so many micro-batches, and none for those before.

    What comes in, the gradient and the factors are means over all of the micro-batches'
    examples, or weights; a micro-batch whose numbers are not finite counts for none. The
    last one stands for all in the quadratic model's matrix, in the second moments of
    "ekfac", and where the objective is measured. `optax.MultiSteps` hands on the last
    curvature alone.

    Args:
      optimizer: any that takes a curvature; put this outside of it.
      blocks: what `kfgn.layers.find_blocks` returned.
      every: micro-batches for an update.

    Raises:
      OptionError: an option out of its range; in `update`, no curvature.

    >>> import jax.numpy as jnp, optax, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> blocks = kfgn.layers.find_blocks(objective, w, batch)
    >>> tx = multi_steps(kfgn.kfra(objective, w, batch), blocks, every=2)
    >>> (_, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> first, state = tx.update(grads, tx.init(w), w, curvature=curvature)
    >>> second, state = tx.update(grads, state, w, curvature=curvature)
    >>> bool(jnp.any(first)), bool(jnp.any(second))
    (False, True)
    """
    check_whole("every", every, 1, traced=True)
    preconditioner = Preconditioner(blocks)
    extended = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> MultiStepsState:
        leaves = named_leaves(params)
        factors = preconditioner.init(leaves)[0]
        means = zeros_like(params), zeros_like(leaves), factors
        return MultiStepsState(counter(), number(), means, optimizer.init(params))

    def update(
        updates: PyTree,
        state: MultiStepsState,
        params: PyTree = None,
        *,
        curvature: Curvature | None = None,
        **others: Any,
    ) -> tuple[PyTree, MultiStepsState]:
        check_state(state, MultiStepsState)
        leaves = named_leaves(updates)
        curvature = require_curvature(curvature, blocks, leaves)
        found = curvature.factors
        own = {n: curvature.gradient[n] for n in leaves}
        new = updates, own, {n: found[n] for n in state.gathered[2]}
        usable = is_usable(curvature, new) & all_finite(curvature.value)
        of_this = curvature.examples
        before = jnp.where(state.micro_batches == 0, 0, state.examples).astype(of_this.dtype)
        examples = before + jnp.where(usable, of_this, 0)
        share = of_this / jnp.where(examples == 0, 1, examples)

        def mean(old: Array, new: Array) -> Array:
            # In at least float32: of nothing gathered before, the new is all of it.
            wide, part = (x.astype(factor_dtype(new.dtype)) for x in (new, share))
            return jnp.where(before == 0, wide, old + part * (wide - old)).astype(new.dtype)

        gathered = keep_if(usable, jax.tree.map(mean, state.gathered, new), state.gathered)
        whole = curvature._replace(
            lazy_factors=known(gathered[2]), gradient=gathered[1], examples=examples
        )

        def move() -> tuple[PyTree, PyTree]:
            return extended.update(gathered[0], state.inner, params, curvature=whole, **others)

        count = state.micro_batches + 1
        last = count == every
        step, inner = jax.lax.cond(last, move, lambda: (zeros_like(updates), state.inner))
        examples = examples.astype(jnp.float32)
        return step, MultiStepsState(jnp.where(last, 0, count), examples, gathered, inner)

    return optax.GradientTransformationExtraArgs(init, update)
