"""The errors kfgn raises: each names what was found, what was expected and the remedy."""


class KfgnError(ValueError):
    """Base of all errors that kfgn raises on bad input."""


class LossError(KfgnError):
    """Outputs or targets do not fit the loss, or the loss lacks what a method needs."""


class BatchError(KfgnError):
    """A batch does not have the form `(inputs, targets)` with one leading axis."""


class ModelError(KfgnError):
    """The model cannot be traced, or its outputs do not fit the batch."""


class LoopError(ModelError):
    """A loop over parameters is longer than a method that unrolls it goes."""


class LayerError(KfgnError):
    """A parameter belongs to no layer that kfgn has a block for."""


class ParameterError(KfgnError):
    """Parameters do not match the objective or the optimizer they are used with."""


class UnknownPrimitiveWarning(UserWarning):
    """A primitive that kfgn does not know is treated example by example."""


class CostWarning(UserWarning):
    """An update is predicted to cost many gradients."""


class SkippedUpdatesWarning(UserWarning):
    """Updates were skipped one after another, for numbers that are not finite."""


class OptionError(KfgnError):
    """An option has a value outside its range, or a needed argument is missing."""
