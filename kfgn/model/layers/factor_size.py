"""Factors that would be too large: refused by name, or kept as blocks or as a diagonal."""

import dataclasses
import math

from kfgn.base.checks import DENSE_BYTES, check_choice, check_whole
from kfgn.base.errors import LayerError
from kfgn.base.linalg import factor_dtype
from kfgn.model.layers.layer import Layer

TREATMENTS = ("raise", "split", "diagonal")


def check_factor_size(treatment: str, limit: int | None) -> None:
    """Raises OptionError unless both make sense."""
    check_choice("large_factors", treatment, TREATMENTS)
    if limit is not None:
        check_whole("factor_limit", limit, 1)


def limited(
    layers: dict[str, Layer], treatment: str = "raise", limit: int | None = None
) -> dict[str, Layer]:
    """The layers, with no factor of more than `limit` rows.

    Args:
      layers: by name.
      treatment: of larger factors: "raise"; "split" into the fewest equal blocks on
        the diagonal that are within the limit; or "diagonal"; "whole" where none are formed.
      limit: None stands for what a factor of 2 GiB has.

    Raises:
      LayerError: a factor is larger, and to "raise".
    """
    if treatment == "whole":
        return layers
    return {name: _limited(name, layer, treatment, limit) for name, layer in layers.items()}


def _limited(name: str, layer: Layer, treatment: str, limit: int | None) -> Layer:
    most = most_rows(layer) if limit is None else limit
    sizes = layer.activation_size, layer.d_out
    large = [sizes[0] > most and not layer.indexed, sizes[1] > most]
    if not any(large):
        return layer
    if treatment == "raise":
        raise LayerError(too_large(name, layer, sizes[large.index(True)], most))
    splits = [
        (size if treatment == "diagonal" else -(-size // most)) if is_large else 1
        for size, is_large in zip(sizes, large, strict=True)
    ]
    if layer.indexed:  # whose activation factor is a diagonal anyway
        splits[0] = sizes[0]
    return dataclasses.replace(layer, splits=(splits[0], splits[1]))


def most_rows(layer: Layer) -> int:
    """The rows of a factor that takes 2 GiB, with all that are stacked with it."""
    itemsize = factor_dtype(*(v.aval.dtype for v in layer.variables.values())).itemsize
    return math.isqrt(DENSE_BYTES // (itemsize * layer.stack))


def too_large(name: str, layer: Layer, size: int, most: int) -> str:
    """What is wrong with a factor of so many rows, and what helps."""
    side = "activation" if size == layer.activation_size else "pre-activation"
    itemsize = factor_dtype(*(v.aval.dtype for v in layer.variables.values())).itemsize
    stack = f"{layer.stack} x " if layer.stack > 1 else ""
    return (
        f"the {side} factor of layer {name!r} would have {stack}{size} x {size} entries "
        f"({layer.stack * size**2 * itemsize / 2**30:.3g} GiB); at most {most} rows are formed. "
        'Pass large_factors="split" to keep blocks on its diagonal of at most factor_limit rows, '
        'or large_factors="diagonal" to keep its diagonal alone, both to '
        "kfgn.value_grad_and_curvature and to the optimizer; or a larger factor_limit."
    )
