"""Complex kernels taken apart: `re + 1j * im` of real parameters is two real kernels.

With data x = a + i b, a product with a kernel W = U + i V is

    x W = (a U - b V) + i (b U + a V),

where U and V each meet a and b, as two positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.model.program.equations import Equation, is_complex
from kfgn.model.program.primitives import row_of

Parts = tuple[Any, Any]  # real and imaginary; None stands for zero


def parts_of(equation: Equation, values: Sequence[Any], parts: Sequence[Parts | None]) -> Any:
    """Real and imaginary part of what is made of parameters; None where that is not known.

    Args:
      equation: one with one complex result.
      values: its operands.
      parts: of those whose parts are known.
    """
    name = equation.primitive.name
    both = [p or _split(x, atom) for p, x, atom in zip(parts, values, equation.invars, strict=True)]
    if name == "complex":
        return values[0], values[1]
    if name == "convert_element_type":
        dtype = jnp.finfo(equation.params["new_dtype"]).dtype
        return tuple(None if x is None else jnp.asarray(x).astype(dtype) for x in both[0])
    if name in ("add", "add_any", "sub"):
        (a, b), (c, d) = both
        return (_plus(a, c), _plus(b, d)) if name != "sub" else (_plus(a, c, -1), _plus(b, d, -1))
    if name == "mul":
        (a, b), (c, d) = both
        return _plus(_times(a, c), _times(b, d), -1), _plus(_times(a, d), _times(b, c))
    if name in ("neg", "conj"):
        a, b = both[0]
        return (a if name == "conj" else _plus(None, a, -1)), _plus(None, b, -1)
    if row_of(equation).moves is not None and len(equation.invars) == len(equation.outvars) == 1:
        moved = [None if x is None else equation.primitive.bind(x, **equation.params)
                 for x in both[0]]  # fmt: skip
        return tuple(moved)
    return None


def product_with_parts(equation: Equation, side: int, data: Any, parts: Parts) -> Parts | None:
    """A product of data with a kernel, operand number `side`, that has parts."""
    whole = jnp.stack([jnp.real(data), jnp.imag(data)]) if jnp.iscomplexobj(data) else data[None]
    if equation.primitive.name == "mul":

        def times(part: Any) -> Any:
            return list(whole * jnp.broadcast_to(part, (1, *data.shape)))

    elif equation.primitive.name == "dot_general":
        contracted, batch = equation.params["dimension_numbers"]
        place = len(batch[0])  # of the new axis in the result
        if side == 0:
            place += len(equation.invars[0].aval.shape) - len(contracted[0]) - len(batch[0])

        def shifted(pair: Any) -> Any:
            return tuple(tuple(axis + (k != side) for axis in axes) for k, axes in enumerate(pair))

        dimensions = (shifted(contracted), shifted(batch))
        precision = equation.params["precision"]

        def times(part: Any) -> Any:
            left, right = (part, whole) if side == 0 else (whole, part)
            found = jax.lax.dot_general(left, right, dimensions, precision=precision)
            return list(jnp.moveaxis(found, place, 0))

    else:
        return None
    none = [None, None]
    u, v = (none if part is None else [*times(part), None][:2] for part in parts)
    return _plus(u[0], v[1], -1), _plus(u[1], v[0])


def joined_parts(parts: Parts, dtype: Any) -> Any:
    """The complex value."""
    real, imag = parts
    known = real if real is not None else imag
    zero = jnp.zeros_like(known)
    return jax.lax.complex(zero if real is None else real, zero if imag is None else imag).astype(
        dtype
    )


def _split(value: Any, atom: Any) -> Parts:
    if is_complex(atom):
        if isinstance(value, jax.core.Tracer):
            return jnp.real(value), jnp.imag(value)
        real, imag = np.real(value), np.imag(value)
        return (real if np.any(real) else None), (imag if np.any(imag) else None)
    return value, None


def _plus(a: Any, b: Any, sign: int = 1) -> Any:
    if b is None:
        return a
    if a is None:
        return b if sign == 1 else -b
    return a + b if sign == 1 else a - b


def _times(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a * b
