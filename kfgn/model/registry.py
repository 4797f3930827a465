"""What users tell kfgn about primitives: how they are differentiated, and which are layers.

Both functions change the registry of this process, the dictionaries `PRIMITIVES`
and `LAYERS` below: deleting a name from them undoes its registration. What has
been traced by `jax.jit` before keeps what was registered then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from kfgn.base.errors import OptionError
from kfgn.model.equations import Equation, Var, variables
from kfgn.model.parameter_path import Source
from kfgn.model.parameter_use import Form

Reader = Callable[[Equation, int, Source], "Form | None"]

PRIMITIVE_KINDS = ("linear", "multilinear", "elementwise", "general")

# Kinds whose Jacobians kfgn knows in closed form.
OWN_LAYER_KINDS = ("dense", "conv", "embedding", "scale", "shift")

PRIMITIVES: dict[str, str] = {}  # kinds by the primitive's name
LAYERS: dict[str, Reader] = {}  # by the primitive's name


def register_primitive(name: str, kind: str) -> None:
    """Tells kfgn how the output of a primitive depends on its operands.

    kfgn takes every derivative from the primitive's own rules; the kind says
    only what the derivatives of all examples have in common. A primitive that
    kfgn does not know is "general": correct, at the cost of one vector-Jacobian
    product per example, and announced once by an `UnknownPrimitiveWarning`.

    A wrong kind gives wrong curvature. kfgn knows primitives by their names:
    give yours a name that jax does not use. Of several registrations of a name
    the last one counts, and any counts more than what kfgn knows itself.

    Args:
      name: the primitive's name in a jaxpr, `primitive.name`.
      kind: one of

        - "linear": linear in all its floating-point operands together, as a
          sum, a reshape or a Fourier transform is.
        - "multilinear": linear in each differentiable operand while the others
          are held fixed, as a product is.
        - "elementwise": entry i of the one output depends on entry i of every
          operand of the output's size alone, entries counted in row-major
          order; further operands have one entry.
        - "general": anything else. Registering it silences the warning.

    Raises:
      OptionError: the name is not a string, or there is no such kind.

    Example:
      A primitive `cube` that has a derivative, and acts on each entry::

          kfgn.layers.register_primitive("cube", "elementwise")
    """
    _check_name(name, "register_primitive")
    if kind not in PRIMITIVE_KINDS:
        known = ", ".join(f'"{k}"' for k in PRIMITIVE_KINDS)
        raise OptionError(f"kind of primitive {name!r} must be one of {known}, found {kind!r}")
    PRIMITIVES[name] = kind


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
      A product with the diagonal blocks of a matrix, `[G, I, O]`, as a
      primitive of its own, with the rules that jax needs of it::

          import jax
          import jax.numpy as jnp
          from jax.extend.core import Primitive
          from jax.interpreters import ad, batching, mlir

          import kfgn

          def by_einsum(x, w):
              blocks = x.reshape(x.shape[0], w.shape[0], w.shape[1])
              return jnp.einsum("bgi,gio->bgo", blocks, w).reshape(x.shape[0], -1)

          def batched(operands, axes):
              return jax.vmap(by_einsum, in_axes=axes)(*operands), 0

          def kernel_cotangent(g, x, w):
              groups = w.aval.shape[0]  # the kernel has no value here
              x, g = (a.reshape(a.shape[0], groups, -1) for a in (x, g))
              return jnp.einsum("bgi,bgo->gio", x, g)

          product_p = Primitive("block_product")
          product_p.def_impl(by_einsum)
          product_p.def_abstract_eval(
              lambda x, w: x.update(shape=(x.shape[0], w.shape[0] * w.shape[2]))
          )
          mlir.register_lowering(product_p, mlir.lower_fun(by_einsum, multiple_results=False))
          batching.primitive_batchers[product_p] = batched
          ad.defbilinear(
              product_p, lambda g, x, w: product_p.bind(g, w.swapaxes(1, 2)), kernel_cotangent
          )

          def read_block_product(equation, side, source):
              if side != 1:
                  return None
              x, w = equation.invars
              rows, (groups, d_in, d_out) = x.aval.shape[0], w.aval.shape
              return kfgn.layers.Form(
                  kind="block_product",
                  groups=groups,
                  positions=rows,
                  d_in=d_in,
                  d_out=d_out,
                  activations=lambda a: a.reshape(-1, rows, groups, d_in).swapaxes(1, 2),
                  kernel=lambda w: w,
                  outputs=lambda h: h.reshape(*h.shape[:-1], groups, d_out).swapaxes(-3, -2),
              )

          kfgn.layers.register_layer("block_product", read_block_product)
          kfgn.layers.register_primitive("block_product", "multilinear")

      The last line is for products where the kernel is no parameter of the
      model, or has no block.
    """
    _check_name(primitive, "register_layer")
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


def _check_name(name: Any, function: str) -> None:
    if not isinstance(name, str) or not name:
        hint = f"; pass its name, {name.name!r}" if isinstance(name, jex.Primitive) else ""
        raise OptionError(
            f"{function} expects the name of a primitive, a string that is not empty, found "
            f"{name!r}{hint}"
        )


def _check_form(form: Any, equation: Equation, kernel: Var, data: Var) -> None:
    who = f"the reader registered for {equation.primitive.name!r}"
    if not isinstance(form, Form):
        raise OptionError(
            f"{who} must return a kfgn.layers.Form or None, found a {type(form).__name__}"
        )
    if form.kind in OWN_LAYER_KINDS:
        raise OptionError(f"{who} must name a kind of its own, found kfgn's kind {form.kind!r}")
    result = equation.outvars[0]
    s, t, i, o = form.groups, form.positions, form.d_in, form.d_out
    expected = {
        "activations": (data, (1,), (1, s, t) if form.indexed else (1, s, t, i)),
        "kernel": (kernel, (), (s, i, o)),
        "outputs": (result, (), (s, t, o)),
    }
    for field, (operand, lead, shape) in expected.items():
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
