"""What losses expect of the shapes of an example's outputs and target."""

from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import LossError


def require_array(loss: Any, outputs: Any) -> None:
    """Raises LossError for outputs that are a pytree."""
    if not hasattr(outputs, "shape"):
        raise LossError(
            f"{loss.name} takes a single array of outputs, found a "
            f"{type(outputs).__name__}; use kfgn.losses.from_function for several outputs."
        )


def require_shape(loss: Any, targets: Any, expected: tuple, outputs: tuple) -> None:
    """Raises LossError for a target of another shape."""
    found = getattr(targets, "shape", None)
    if found != expected:
        raise LossError(
            f"{loss.name}: an example has outputs of shape {outputs}, so its target must have "
            f"shape {expected}, found {found}; check the model's last layer and the targets."
        )


def masks_over(loss: Any, masks: Any, outputs: Any) -> Any:
    """Masks as booleans of the outputs' shapes; raises LossError where they do not fit."""

    def over(output: Any, mask: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(mask, bool), output.shape)

    try:
        return jax.tree.map(over, outputs, masks)
    except ValueError as error:
        found, expected = (jax.tree.map(jnp.shape, x) for x in (masks, outputs))
        raise LossError(
            f"the loss {loss.name!r}: heeded must return masks that broadcast to an example's "
            f"outputs, of shape {expected}, found {found}"
        ) from error
