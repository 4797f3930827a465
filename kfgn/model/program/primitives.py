"""What kfgn knows of primitives: one table, a row for each.

A row only classifies; every Jacobian itself comes from automatic
differentiation. A primitive without a row is *general*: correct, and treated
by its vector-Jacobian product example by example.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from kfgn.base.errors import OptionError
from kfgn.model.program.equations import Equation, bodies

# `(labels of the operand's entries, equation, number of the output) -> labels`
Moves = Callable[[np.ndarray, Equation, int], np.ndarray]

ALL = range(10**6)  # positions of operands


@dataclasses.dataclass(frozen=True)
class Primitive:
    """The row of a primitive; what is left out does not hold of it.

    Args:
      linear_in: linear in the operands at these positions together, where the
        others (a denominator, a predicate, indices) are the same for every example.
      multilinear: linear in one operand where the others are the same.
      elementwise: entry i of the output depends on entry i of each operand alone.
      heavy: a linear map that mixes many entries: cheaper as a node of its own
        than inside a chain, whose Jacobian is applied example by example.
      moves: how it moves, repeats or drops the entries of its one operand.
      keeps_order: if the sizes are equal, entries keep their row-major order.
      signs: an entrywise sum of its operands with these signs.
      by_number: an elementwise product; the factor that a number makes.
      body: the parameter that holds the jaxpr of a call.
      inlined: a call that only groups equations.
    """

    linear_in: Sequence[int] = ()
    multilinear: bool = False
    elementwise: bool = False
    heavy: bool = False
    moves: Moves | None = None
    keeps_order: bool = False
    signs: tuple[float, ...] = ()
    by_number: Callable[[float], float] | None = None
    body: str = ""
    inlined: bool = False


def _reshaped(labels: np.ndarray, equation: Equation, output: int) -> np.ndarray:
    return labels.reshape(equation.outvars[output].aval.shape)


def _sliced(labels: np.ndarray, equation: Equation, output: int) -> np.ndarray:
    options = equation.params
    strides = options["strides"] or (1,) * labels.ndim
    limits = zip(options["start_indices"], options["limit_indices"], strides, strict=True)
    return labels[tuple(slice(*limit) for limit in limits)]


def _split(labels: np.ndarray, equation: Equation, output: int) -> np.ndarray:
    edges = np.cumsum(equation.params["sizes"])[:-1]
    return np.split(labels, edges, equation.params["axis"])[output]


def _broadcast(labels: np.ndarray, equation: Equation, output: int) -> np.ndarray:
    shape = equation.outvars[output].aval.shape
    spread = [1] * len(shape)
    for axis, length in zip(equation.params["broadcast_dimensions"], labels.shape, strict=True):
        spread[axis] = length
    return np.broadcast_to(labels.reshape(spread), shape)


_linear = functools.partial(Primitive, linear_in=ALL)
_moving = functools.partial(_linear, moves=_reshaped)
_in_order = functools.partial(_moving, keeps_order=True)

#: Those that draw random bits.
RANDOM = {"random_bits", "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform"}
REMAT = ("remat", "remat2", "checkpoint")  # the names of `jax.checkpoint`

_ROWS = {
    # Entries moved.
    "reshape squeeze expand_dims": _in_order(),
    "copy copy_p optimization_barrier name device_put sharding_constraint layout_constraint "
    "reshard pvary pcast": _in_order(),
    "convert_element_type reduce_precision": _in_order(),
    "broadcast_in_dim": _in_order(moves=_broadcast),
    "tile": _in_order(moves=lambda x, e, _: np.tile(x, e.params["reps"])),
    "transpose": _moving(moves=lambda x, e, _: np.transpose(x, e.params["permutation"])),
    "rev": _moving(moves=lambda x, e, _: np.flip(x, e.params["dimensions"])),
    "slice": _moving(moves=_sliced),
    "split": _moving(moves=_split),
    "unstack": _moving(moves=lambda x, e, k: np.take(x, k, axis=e.params["axis"])),
    "dynamic_slice gather": _linear(linear_in=(0,)),
    "dynamic_update_slice": _linear(linear_in=(0, 1)),
    "concatenate pad stack real imag": _linear(),
    # Sums and products.
    "add add_any": _linear(elementwise=True, signs=(1.0, 1.0)),
    "sub": _linear(elementwise=True, signs=(1.0, -1.0)),
    "neg": _linear(elementwise=True, signs=(-1.0,)),
    "mul": Primitive(multilinear=True, elementwise=True, by_number=float),
    "div": _linear(linear_in=(0,), elementwise=True, by_number=lambda x: 1 / float(x)),
    "select_n": _linear(linear_in=range(1, 10**6), elementwise=True),
    "reduce_sum": _linear(),
    "cumsum reduce_window_sum": _linear(heavy=True),
    "dot_general conv_general_dilated": Primitive(multilinear=True, heavy=True),
    "scatter-add scatter-sub": _linear(linear_in=(0, 2)),
    # Functions of every entry.
    "abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp cos cosh "
    "digamma erf erf_inv erfc exp exp2 expm1 floor integer_pow is_finite lgamma log log1p log2 "
    "logistic max min one_minus_square pow rem round rsqrt sign sin sinh sqrt square "
    "stop_gradient tan tanh xor and or not eq ne lt le gt ge": Primitive(elementwise=True),
    # Calls.
    "jit pjit": Primitive(body="jaxpr", inlined=True),
    " ".join(REMAT): Primitive(body="jaxpr", inlined=True),
    "closed_call core_call": Primitive(body="call_jaxpr", inlined=True),
    "custom_jvp_call custom_vjp_call": Primitive(body="call_jaxpr"),
    "custom_vjp_call_jaxpr": Primitive(body="fun_jaxpr"),
}

TABLE = {name: row for names, row in _ROWS.items() for name in names.split()}
_GENERAL = Primitive()

# What `register_primitive` adds: deleting a name undoes its registration.
REGISTERED: dict[str, Primitive] = {}

_KINDS = {
    "linear": _linear(),
    "multilinear": Primitive(multilinear=True, heavy=True),
    "elementwise": Primitive(elementwise=True),
    "reshape": _in_order(),
    "general": _GENERAL,
}
PRIMITIVE_KINDS = tuple(_KINDS)


def register_primitive(name: str, kind: str, *, moves: Moves | None = None) -> None:
    """Tells kfgn how the output of a primitive depends on its operands.

    kfgn takes every derivative from the primitive's own rules; the kind says
    only what the derivatives of all examples have in common. A primitive that
    kfgn does not know is "general": correct, at the cost of one vector-Jacobian
    product per example, and announced once by an `UnknownPrimitiveWarning`.

    A wrong kind gives wrong curvature. kfgn knows primitives by their names:
    give yours a name that jax does not use. Of several registrations of a name
    the last one counts, and any counts more than what kfgn knows itself. What
    `jax.jit` has traced before keeps what was registered then.

    Args:
      name: the primitive's name in a jaxpr, `primitive.name`.
      kind: one of

        - "linear": linear in all its floating-point operands together, as a
          sum or a Fourier transform is.
        - "multilinear": linear in each differentiable operand while the others
          are held fixed, as a product is.
        - "elementwise": entry i of the one output depends on entry i of every
          operand of the output's size alone, entries counted in row-major
          order; further operands have one entry.
        - "reshape": the entries of its one operand, in their row-major order.
          A parameter may pass through it on its way to a layer.
        - "general": anything else. Registering it silences the warning.
      moves: for a "linear" primitive that only moves, repeats or drops the
        entries of its one operand, so that a parameter may pass through it, too:
        `(labels, equation, output) -> labels` makes of a numpy array like the
        operand one like the output of that number.

    Raises:
      OptionError: the name is not a string, there is no such kind, or `moves`
        comes with another kind than "linear", or is no function.

    Example:
      Primitives that cube every entry, and that transpose a matrix:

      >>> from kfgn.layers import register_primitive
      >>> register_primitive("cube", "elementwise")
      >>> register_primitive("turn", "linear", moves=lambda labels, equation, output: labels.T)
    """
    check_name(name, "register_primitive")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(f'"{k}"' for k in PRIMITIVE_KINDS)
        raise OptionError(f"kind of primitive {name!r} must be one of {known}, found {kind!r}")
    if moves is not None and (kind != "linear" or not callable(moves)):
        raise OptionError(
            f'moves of primitive {name!r} must be a function, of a primitive of kind "linear", '
            f'found {moves!r} for kind "{kind}"'
        )
    row = _KINDS[kind]
    REGISTERED[name] = row if moves is None else dataclasses.replace(row, moves=moves)


def check_name(name: Any, function: str) -> None:
    """Raises OptionError unless it can be the name of a primitive."""
    if not isinstance(name, str) or not name:
        hint = f"; pass its name, {name.name!r}" if isinstance(name, jex.Primitive) else ""
        raise OptionError(
            f"{function} expects the name of a primitive, a string that is not empty, found "
            f"{name!r}{hint}"
        )


def row_of(equation: Equation) -> Primitive:
    """The row of the equation's primitive; an empty one where there is none."""
    name = equation.primitive.name
    return REGISTERED.get(name) or TABLE.get(name, _GENERAL)


def is_known(equation: Equation) -> bool:
    """Whether the primitive has a row, or is one of jax's own."""
    name = equation.primitive.name
    return name in REGISTERED or name in TABLE or _is_of_jax(equation.primitive)


def is_differentiable(equation: Equation) -> bool:
    """Whether the primitive is surely one of jax's that always have a derivative."""
    return equation.primitive.name in TABLE


def _is_of_jax(primitive: jex.Primitive) -> bool:
    """Whether jax's own modules say how the primitive is evaluated."""
    function = primitive.impl
    if getattr(function, "__func__", None) is jex.Primitive.impl:
        return False  # which says that nobody does
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0] in ("jax", "jaxlib")


def draws(equation: Equation) -> bool:
    """Whether an equation draws random bits, or one inside of it."""
    inside = (e for body in bodies(equation) for e in body.eqns)
    return equation.primitive.name in RANDOM or any(map(draws, inside))
