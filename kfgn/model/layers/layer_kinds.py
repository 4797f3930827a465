"""The kinds of layers: which primitives multiply a kernel with data, and who reads them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kfgn.base.errors import OptionError
from kfgn.model.layers.parameter_use import Form
from kfgn.model.layers.readers import Reader, convolution, dense, embedding, scale, shift
from kfgn.model.layers.sources import Source
from kfgn.model.program.equations import Equation, Var, variables
from kfgn.model.program.primitives import check_name

_READERS: dict[str, Reader] = {
    "dot_general": dense,
    "conv_general_dilated": convolution,
    "gather": embedding,
    "mul": scale,
    "add": shift,
    "add_any": shift,
    "sub": shift,
    "concatenate": shift,
}

# What `register_layer` adds, by the primitive's name: deleting one undoes it.
LAYERS: dict[str, Reader] = {}


def read_form(equation: Equation, side: int, source: Source) -> Form | None:
    """The form of an equation whose operand `side` is a kernel, or None.

    What has no entries is no layer.
    """
    name = equation.primitive.name
    if any(v.aval.size == 0 for v in (*equation.invars, *equation.outvars)):
        return None
    if name in LAYERS:
        return read_registered(equation, side, source)
    reader = _READERS.get(name)
    return reader(equation, side, source) if reader else None


def register_layer(primitive: str, reader: Reader) -> None:
    """Teaches kfgn a layer kind: a primitive that multiplies a kernel with data.

    The primitive has one output and two operands that are not literals: a
    kernel, and data in which it is linear (or indices that it looks up in the
    kernel, with a form that is `indexed`). Its kernel's block is then found,
    factored and preconditioned like that of kfgn's own layers, the bias that is
    added to its result included. The reader is asked wherever one operand is
    made of a parameter, and the other depends on data.

    Args:
      primitive: the primitive's name in a jaxpr, `primitive.name`. A reader for
        one of jax's own primitives takes the place of kfgn's reader for it.
      reader: `(equation, side, source) -> kfgn.layers.Form | None`, where operand
        number `side` of the equation is the kernel, and `source` says which
        parameter it is made of. The equation's shapes are those of a batch of
        one example. `None` says that this equation is no layer: its parameter
        then belongs to none. See `kfgn.layers.Form` for what a form holds; its `kind`
        is a name of your own, and its `kernel` and `outputs` move entries only,
        by methods that numpy's arrays have, too.

    Raises:
      OptionError: the name is not a string, or the reader is not callable; when
        a model is traced: the reader's form does not fit the equation.

    Example:
      A primitive that multiplies vectors with a matrix::

          y[k, o] = sum_i x[k, i] w[i, o]

      >>> import kfgn
      >>> def read_product(equation, side, source):
      ...     if side != 1:
      ...         return None  # the kernel has to be the second operand
      ...     (rows, _), (d_in, d_out) = (v.aval.shape for v in equation.invars)
      ...     return kfgn.layers.Form(
      ...         kind="my product",
      ...         groups=1,
      ...         positions=rows,
      ...         d_in=d_in,
      ...         d_out=d_out,
      ...         activations=lambda x: x.reshape(-1, 1, rows, d_in),
      ...         kernel=lambda w: w.reshape(1, d_in, d_out),
      ...         outputs=lambda y: y.reshape(*y.shape[:-2], 1, rows, d_out),
      ...     )
      >>> kfgn.layers.register_layer("my_product", read_product)
      >>> kfgn.layers.register_primitive("my_product", "multilinear")

      The last line is for products where the kernel is no parameter of the
      model, or has no block.
    """
    check_name(primitive, "register_layer")
    if not callable(reader):
        raise OptionError(
            f"the reader of layer {primitive!r} must be a function (equation, side, source) -> "
            f"kfgn.layers.Form | None, found a {type(reader).__name__}"
        )
    LAYERS[primitive] = reader


def read_registered(equation: Equation, side: int, source: Source) -> Form | None:
    """What the reader registered for the equation's primitive returns, checked."""
    operands = variables(equation.invars)
    # A form speaks of one data operand, and of every entry of the kernel once.
    if source.repeats or len(operands) != 2 or len(equation.outvars) != 1:
        return None
    form = LAYERS[equation.primitive.name](equation, side, source)
    if form is not None:
        kernel = equation.invars[side]
        (data,) = [v for v in operands if v is not kernel]
        _check_form(form, equation, kernel, data)
    return form


def _check_form(form: Any, equation: Equation, kernel: Var, data: Var) -> None:
    who = f"the reader registered for {equation.primitive.name!r}"
    if not isinstance(form, Form):
        raise OptionError(
            f"{who} must return a kfgn.layers.Form or None, found a {type(form).__name__}"
        )
    result = equation.outvars[0]
    s, t, i, o = form.groups, form.positions, form.d_in, form.d_out
    expected = {
        "activations": (data, (1,), (1, s, t) if form.indexed else (1, s, t, i)),
        "kernel": (kernel, (), (s, i, o)),
        "outputs": (result, (), (s, t, o)),
        "matrix": (kernel, (), (data.aval.size, result.aval.size)),
        "diagonal": (kernel, (), (data.aval.size,)),
    }
    for field, (operand, lead, shape) in expected.items():
        if getattr(form, field) is None:
            continue
        given = jax.ShapeDtypeStruct((*lead, *operand.aval.shape), operand.aval.dtype)
        found = jax.eval_shape(getattr(form, field), given).shape
        if found != shape:
            raise OptionError(
                f"{who}: the form's {field} makes {found} of {given.shape}, expected {shape}"
            )
    for field, operand in (("kernel", kernel), ("outputs", result)):
        if not _moves_entries(getattr(form, field), operand.aval.shape):
            raise OptionError(
                f"{who}: the form's {field} must only move the entries of what it is given, each "
                "to one place, and by methods that numpy's arrays have, such as reshape and "
                "swapaxes"
            )


def _moves_entries(function: Callable[[Any], Any], shape: tuple[int, ...]) -> bool:
    labels = np.arange(int(np.prod(shape))).reshape(shape)
    try:
        moved = np.asarray(function(labels))
    except (jax.errors.TracerArrayConversionError, AttributeError, TypeError):
        return False
    return np.array_equal(np.sort(moved, axis=None), labels.reshape(-1))
