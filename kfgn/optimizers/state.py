"""States of transformations, and the one rule for numbers that are not finite: stay.

A state is a NamedTuple of arrays, each of its own: a Python number would be
static to some containers, and a buffer that two share could not be donated.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype
from kfgn.base.types import Array, Number, PyTree, Scalar
from kfgn.curvature.curvature import Curvature

Count: TypeAlias = Int[Array, ""]
Flag: TypeAlias = Bool[Array, ""]


class Metrics(NamedTuple):
    """What the last update that was made saw and did; nothing else reads it.

    Beside it stand what updates read as well; `kfgn.diagnostics.record` has all of it.
    """

    loss: Scalar  # the objective on the batch, l2 included
    gradient_norm: Scalar  # of the gradient that came in
    update_norm: Scalar  # of the step that went out, before a learning rate
    largest_eigenvalue: Scalar  # of the factors, at the last inversion: see `damped_extremes`
    condition: Scalar  # of the damped factors, then


def number(value: Number = 0.0) -> Scalar:
    """A number of a state."""
    return jnp.array(value, jnp.float32)


def counter() -> Count:
    """A count that starts at 0."""
    return jnp.zeros((), jnp.int32)


def no_metrics() -> Metrics:
    """Before the first update."""
    return Metrics(*(number() for _ in Metrics._fields))


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros in the shapes and dtypes of a pytree."""
    return jax.tree.map(jnp.zeros_like, tree)


def all_finite(tree: PyTree) -> Flag:
    """Whether every entry of a pytree is finite.

    Row sums of matrices are taken by a product: nothing that is not finite
    survives a sum, and a product needs no code of its own compiled per shape.
    Sums are of the widest dtype: float16's range is soon left by a sum.
    """
    leaves = jax.tree.leaves(tree)
    dtype = factor_dtype(*(leaf.dtype for leaf in leaves))
    sums = []
    for leaf in leaves:
        if leaf.ndim == 2:
            # Numbers that differ stay a constant, where equal ones would be made by a loop.
            numbers = np.tile(np.array([1, 0.5], leaf.dtype), (leaf.shape[1], 1))
            leaf = jnp.matmul(leaf, numbers, preferred_element_type=dtype)
        sums.append(leaf.ravel().astype(dtype))
    return jnp.all(jnp.isfinite(jnp.concatenate(sums))) if sums else jnp.array(True)


def is_finite(tree: PyTree, squared: Scalar) -> Flag:
    """`all_finite` of a tree whose sum of squares is known: looked at only where that overflows."""
    finite = jnp.isfinite(squared)
    return jax.lax.cond(finite, lambda: jnp.array(True), lambda: all_finite(tree))


def is_usable(curvature: Curvature, read: PyTree) -> Flag:
    """Whether what is read of a batch is finite, and its weights not all zero."""
    return all_finite(read) & (curvature.examples > 0)


def keep_if(condition: Flag, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the condition holds, else `old`, for two pytrees alike."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def zero_unless(condition: Flag, tree: PyTree) -> PyTree:
    """The tree where the condition holds, else zeros."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


def stay(step: PyTree, state: Any) -> tuple[PyTree, Any]:
    """No step, and the state as it was but for its count of skipped updates."""
    return zeros_like(step), state._replace(skipped=state.skipped + 1)


def guarded(good: Flag, step: PyTree, moved: Any, state: Any) -> tuple[PyTree, Any]:
    """The step and the state after it where all is good, else `stay`."""
    return keep_if(good, (step, moved), stay(step, state))


def check_state(state: Any, kind: type) -> None:
    """Raises OptionError for the state of another transformation."""
    if not isinstance(state, kind):
        raise OptionError(
            f"the state must be a {kind.__name__}, found a {type(state).__name__}: pass the one "
            "that this transformation's init or last update returned."
        )
