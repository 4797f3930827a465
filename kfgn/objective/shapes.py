"""What losses in closed form expect of the shapes of an example's outputs and target."""

from typing import Any

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
