"""Functions with a rule of their own for the backward pass, differentiated forwards.

jax differentiates a `custom_vjp` function backwards only. Its derivative
forwards is the transpose of what the user's backward pass does to cotangents,
which exists if that is linear.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import ModelError
from kfgn.base.types import Array
from kfgn.model.equations import (
    Equation,
    Role,
    Var,
    as_array,
    as_function,
    is_differentiated,
    variables,
)
from kfgn.model.primitives import row_of

# Of a closed jaxpr, on arguments with roles.
Evaluate = Callable[[Any, Sequence[Any], Sequence[Role]], list[Any]]


def with_forward_rule(
    equation: Equation, roles: Sequence[Role], evaluate: Evaluate
) -> Callable[..., Sequence[Any]]:
    """The function of a `custom_vjp_call`, with a rule that is differentiable forwards, too.

    Its tangents are the transpose of the backward pass, so its derivative is
    the one that the user's rule defines.

    Args:
      equation: the call.
      roles: those of its operands; it is differentiated in some of them only.
      evaluate: evaluates jaxprs that hold such calls themselves.
    """
    body = equation.params["call_jaxpr"]
    ins = _Shapes(body.jaxpr.invars, roles)
    outs = _Shapes(body.jaxpr.outvars, [Role.ACTIVE] * len(body.jaxpr.outvars))
    # Traced when it is differentiated only: the rule may call the function itself.
    backward = functools.cache(lambda: _backward_pass(equation, ins, outs, evaluate))

    @jax.custom_jvp
    def function(*args: Any) -> list[Any]:
        return outs.arrays(evaluate(body, args, roles))

    @function.defjvp
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        pull_jaxpr = backward()

        def pull(*cotangents: Array) -> list[Array]:
            results = jex.jaxpr_as_fun(pull_jaxpr)(*primals, *cotangents)
            return [as_array(x, s) for x, s in zip(results, ins.floats(ins.all), strict=True)]

        try:
            push = jax.linear_transpose(pull, *outs.floats(outs.all))
            pushed = push(ins.floats(tangents))
        except Exception as error:
            raise ModelError(_no_transpose(equation, f"{type(error).__name__}: {error}")) from error
        zeros = [np.zeros(out.shape, jax.dtypes.float0) for out in outs.all]
        return function(*primals), outs.with_floats(zeros, pushed)

    return lambda *args: function(*ins.arrays(args))


class _Shapes:
    """The shapes of some values with roles, and which of the values are differentiated."""

    def __init__(self, atoms: Iterable[Any], roles: Sequence[Role]):
        self.roles = list(roles)
        self.all = [_shape(v.aval) for v in atoms]
        self._is_float = [
            is_differentiated(role) and jnp.issubdtype(s.dtype, jnp.inexact)
            for role, s in zip(roles, self.all, strict=True)
        ]

    def arrays(self, values: Iterable[Any]) -> list[Any]:
        return [as_array(x, s) for x, s in zip(values, self.all, strict=True)]

    def floats(self, values: Iterable[Any]) -> list[Any]:
        """The values that are differentiated."""
        return [x for x, yes in zip(values, self._is_float, strict=True) if yes]

    def with_floats(self, values: Iterable[Any], floats: Iterable[Any]) -> list[Any]:
        """The values with those that are differentiated replaced, in order."""
        new = iter(floats)
        return [next(new) if yes else x for x, yes in zip(values, self._is_float, strict=True)]


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    # Python numbers among the operands promote like Python numbers in the user's rule.
    is_weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=is_weak)


def _backward_pass(
    equation: Equation, ins: _Shapes, outs: _Shapes, evaluate: Evaluate
) -> jex.ClosedJaxpr:
    """The jaxpr `(*args, *cotangents of float outputs) -> cotangents of float args`."""
    # Operands of their own: one value passed twice has two cotangents.
    own = equation.params["call_jaxpr"].jaxpr.invars
    call = as_function([equation.replace(invars=list(own))], own, equation.outvars)
    count = len(own)

    def backward(*values: Any) -> Sequence[Array]:
        args, cotangents = values[:count], list(values[count:])

        def of_floats(*floats: Array) -> list[Array]:
            return outs.floats(call(*ins.with_floats(args, floats)))

        return jax.vjp(of_floats, *ins.floats(args))[1](cotangents)

    shapes = [*ins.all, *outs.floats(outs.all)]
    roles = [*ins.roles, *outs.floats(outs.roles)]
    traced = jax.make_jaxpr(backward)(*shapes)
    flat = jax.make_jaxpr(lambda *values: evaluate(traced, values, roles))(*shapes)
    if not _vanishes_at_zero(flat, flat.jaxpr.invars[count:]):
        raise ModelError(_no_transpose(equation, "it adds something to them"))
    return flat


def _vanishes_at_zero(closed: jex.ClosedJaxpr, cotangents: Iterable[Var]) -> bool:
    """Whether a flat function that can be transposed adds nothing that no cotangent is in.

    The transpose would silently leave it out.
    """
    jaxpr, moved = closed.jaxpr, set(cotangents)
    zeros = {v for v, x in zip(jaxpr.constvars, closed.consts, strict=True) if _is_zero(x)}

    def vanishes(atom: Any) -> bool:
        if not variables([atom]):
            return _is_zero(atom.val)
        return atom in moved or atom in zeros

    for equation in jaxpr.eqns:
        row, operands = row_of(equation), equation.invars
        terms = [atom for k, atom in enumerate(operands) if k in row.linear_in]
        if moved.intersection(variables(operands)):
            moved.update(equation.outvars)
            # What is linear in several operands together is a sum.
            if len(equation.outvars) == 1 and not all(map(vanishes, terms)):
                return False
        elif (row.multilinear and any(map(vanishes, operands))) or (
            terms and all(map(vanishes, terms))
        ):
            zeros.update(equation.outvars)
    return all(map(vanishes, jaxpr.outvars))


def _is_zero(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    # Integers have cotangents of dtype float0, which holds no numbers.
    value = np.asarray(value)
    return value.dtype == jax.dtypes.float0 or not np.any(value)


def _no_transpose(equation: Equation, why: str) -> str:
    info = getattr(equation.params["call_jaxpr"].jaxpr, "debug_info", None)
    name = getattr(info, "func_src_info", "")
    return (
        f"the backward pass of the custom_vjp function {name} is not linear in the cotangents "
        f"({why}).\nkfgn also differentiates forwards, for which it takes the transpose of the "
        "backward pass; clip gradients, or add to them, in the optimizer or in the loss instead."
    )
