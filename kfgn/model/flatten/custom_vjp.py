"""Functions with a rule of their own for the backward pass.

The derivative of a `custom_vjp` function is what the user's backward pass does
to cotangents. jax does not differentiate it forwards, and neither does kfgn:
see `kfgn.curvature.linear_pass`. A backward pass that is not linear is no
derivative of anything, and refused.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import ModelError
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    as_function,
    is_differentiated,
    is_variable,
)
from kfgn.model.program.primitives import Primitive, row_of


def holds_rule(equation: Equation) -> bool:
    """Whether the equation is a call of a `custom_vjp` function, or holds one."""
    if equation.primitive.name == "custom_vjp_call":
        return True
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    bodies: list[Any] = [getattr(x, "jaxpr", x) for x in found if _is_jaxpr(x)]
    return any(holds_rule(inner) for body in bodies for inner in body.eqns)


def body_of(equation: Equation) -> jex.ClosedJaxpr:
    """The function that a rule belongs to; its parameter's name differs between jax versions."""
    (body,) = filter(_is_jaxpr, equation.params.values())
    return body


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))


def check_linear(
    equation: Equation, roles: Sequence[Role], flatten: Callable[[Any], jex.ClosedJaxpr]
) -> None:
    """Raises ModelError where the backward pass of a `custom_vjp_call` is seen not to be linear.

    What a loop or a call inside it does to cotangents is not seen, and taken
    to be linear, as that of an adaptive solver is.

    Args:
      equation: the call.
      roles: those of its operands; it is differentiated in some of them only.
      flatten: inlines the calls of a closed jaxpr.
    """
    body = body_of(equation).jaxpr
    # Operands of their own: one value passed twice has two cotangents.
    own, shapes = list(body.invars), [_shape(v.aval) for v in body.invars]
    call = as_function([equation.replace(invars=own)], own, equation.outvars)
    moving = [is_differentiated(r) and _is_float(s) for r, s in zip(roles, shapes, strict=True)]
    results = [_shape(v.aval) for v in body.outvars if _is_float(v.aval)]

    def backward(args: list[Any], cotangents: list[Any]) -> Sequence[Any]:
        def of_floats(*floats: Any) -> list[Any]:
            new = iter(floats)
            outs = call(*(next(new) if yes else x for x, yes in zip(args, moving, strict=True)))
            return [x for x in outs if _is_float(x)]

        floats = [x for x, yes in zip(args, moving, strict=True) if yes]
        return jax.vjp(of_floats, *floats)[1](cotangents)

    flat = flatten(jax.make_jaxpr(backward)(shapes, results))
    why = _not_linear(flat, flat.jaxpr.invars[len(shapes) :])
    if why is not None:
        name = getattr(getattr(body, "debug_info", None), "func_src_info", "")
        raise ModelError(
            f"the backward pass of the custom_vjp function {name} is not linear in the cotangents "
            f"({why}), so that it is the derivative of no function, and there is no curvature; "
            "clip gradients, or add to them, in the optimizer or in the loss instead."
        )


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    # Python numbers among the operands promote like Python numbers in the user's rule.
    is_weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=is_weak)


def _is_float(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def _not_linear(closed: jex.ClosedJaxpr, cotangents: Iterable[Var]) -> str | None:
    """What a flat function does to its cotangents that is not linear, in words."""
    jaxpr, moved = closed.jaxpr, set(cotangents)
    zeros = {v for v, x in zip(jaxpr.constvars, closed.consts, strict=True) if _is_zero(x)}

    def vanishes(atom: Any) -> bool:
        if not is_variable(atom):
            return _is_zero(atom.val)
        return atom in moved or atom in zeros

    for equation in jaxpr.eqns:
        row, operands = row_of(equation), equation.invars
        terms = [atom for k, atom in enumerate(operands) if k in row.linear_in]
        places = {k for k, atom in enumerate(operands) if is_variable(atom) and atom in moved}
        if places:
            moved.update(equation.outvars)
            if not _keeps_linear(row, places):
                return f"it takes `{equation.primitive.name}` of them"
            # What is linear in several operands together is a sum.
            if len(equation.outvars) == 1 and not all(map(vanishes, terms)):
                return "it adds something to them"
        elif (row.multilinear and any(map(vanishes, operands))) or (
            terms and all(map(vanishes, terms))
        ):
            zeros.update(equation.outvars)
    return None if all(map(vanishes, jaxpr.outvars)) else "it adds something to them"


def _keeps_linear(row: Primitive, places: set[int]) -> bool:
    if row.multilinear:
        return len(places) == 1
    if row.linear_in:
        return all(k in row.linear_in for k in places)
    return not row.elementwise


def _is_zero(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    # Integers have cotangents of dtype float0, which holds no numbers.
    value = np.asarray(value)
    return value.dtype == jax.dtypes.float0 or not np.any(value)
