"""The errors and warnings that kfgn raises."""

from kfgn.base.errors import (
    BatchError,
    CostWarning,
    KfgnError,
    LayerError,
    LoopError,
    LossError,
    ModelError,
    OptionError,
    ParameterError,
    SkippedUpdatesWarning,
    UnknownPrimitiveWarning,
)

__all__ = [
    "BatchError",
    "CostWarning",
    "KfgnError",
    "LayerError",
    "LoopError",
    "LossError",
    "ModelError",
    "OptionError",
    "ParameterError",
    "SkippedUpdatesWarning",
    "UnknownPrimitiveWarning",
]
