"""Inlining: a jaxpr evaluated anew, without calls, or loops over parameters.

It runs under a second trace, whose equations are then flat. Every value
carries along what it depends on: what depends on no parameter is never
differentiated, and keeps its loops and its rules.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.model.complex_parts import Parts, joined_parts, parts_of, product_with_parts
from kfgn.model.custom_vjp import check_linear
from kfgn.model.equations import (
    Equation,
    Role,
    Var,
    abstract,
    as_array,
    bind,
    is_complex,
    is_differentiated,
    joined,
)
from kfgn.model.primitives import row_of


class Value(NamedTuple):
    """A traced array, and what it depends on."""

    array: Any
    role: Role
    parts: Parts | None = None  # real and imaginary, of a complex value made of parameters


def inline(body: Any, arguments: Sequence[Value], bind: Callable = bind) -> list[Value]:
    """Evaluates a jaxpr, or closed jaxpr, equation by equation, going into calls and loops.

    `bind(equation, arrays)` evaluates what is kept as a single equation.
    """
    jaxpr, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
    env = {v: Value(c, Role.CONSTANT) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    env.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        results = _evaluate(equation, [_value(env, atom) for atom in equation.invars], bind)
        env.update(zip(equation.outvars, results, strict=True))
    return [_value(env, atom) for atom in jaxpr.outvars]


def _value(env: dict[Var, Value], atom: Any) -> Value:
    if isinstance(atom, jex.Literal):
        return Value(atom.val, Role.CONSTANT)
    return env[atom]


def _evaluate(equation: Equation, operands: list[Value], bind: Callable) -> list[Value]:
    row = row_of(equation)
    if row.inlined and row.body in equation.params:
        return inline(equation.params[row.body], operands, bind)
    name = equation.primitive.name
    if name == "cond" and _differentiated(operands):
        return _branches(equation, operands)
    if name == "dot_general" and any(map(_is_number, operands)):
        return _product_with_number(equation, operands)
    if name == "scan" and _differentiated(operands):
        return _unroll(equation, operands)
    if name == "custom_vjp_call" and _differentiated(operands):
        check_linear(equation, [v.role for v in operands], flattened)
    roles = [v.role for v in operands]
    if len(equation.outvars) == 1 and is_complex(equation.outvars[0]):
        parts = _parts(equation, operands)
        if parts is not None:
            return [
                Value(joined_parts(parts, equation.outvars[0].aval.dtype), joined(roles), parts)
            ]
    if name == "div" and roles[1] is Role.PARAMETER and roles[0] >= Role.PASSIVE:
        x, parameter = operands[0].array, operands[1].array
        results = [jax.lax.mul(x, 1 / parameter)]  # as a product it is a layer
    else:
        results = bind(equation, [v.array for v in operands])
    role = joined(v.role for v in operands)
    return [Value(array, role) for array in results]


def _parts(equation: Equation, operands: list[Value]) -> Parts | None:
    """Real and imaginary part of what a parameter, or its product with data, is made into."""
    roles, known = [v.role for v in operands], [v.parts for v in operands]
    arrays = [
        v.array if isinstance(v.array, jax.Array) else np.asarray(v.array, atom.aval.dtype)
        for v, atom in zip(operands, equation.invars, strict=True)
    ]
    sums = equation.primitive.name in ("add", "add_any", "sub") and any(known)
    if joined(roles) is Role.PARAMETER or (sums and Role.PARAMETER in roles):
        return parts_of(equation, arrays, known)
    sides = [k for k, v in enumerate(operands) if v.parts and v.role is Role.PARAMETER]
    if len(sides) != 1 or len(operands) != 2 or roles[1 - sides[0]] < Role.PASSIVE:
        return None
    found = known[sides[0]]
    assert found is not None
    return product_with_parts(equation, sides[0], arrays[1 - sides[0]], found)


def _is_number(value: Value) -> bool:
    return value.role is Role.CONSTANT and not jnp.shape(value.array)


def _product_with_number(equation: Equation, operands: list[Value]) -> list[Value]:
    """The number counts as data: the cotangent of an only output, which its kernel meets."""
    operands = [
        Value(jax.lax.optimization_barrier(as_array(v.array, atom.aval)), Role.PASSIVE)
        if _is_number(v)
        else v
        for v, atom in zip(operands, equation.invars, strict=True)
    ]
    product = equation.primitive.bind(*(v.array for v in operands), **equation.params)
    return [Value(product, joined(v.role for v in operands))]


def _differentiated(values: Iterable[Value]) -> bool:
    return any(is_differentiated(v.role) for v in values)


def flattened(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The same function without calls; its loops and rules stay."""

    def inlined(*args: Any) -> list[Any]:
        return [v.array for v in inline(closed, [Value(x, Role.CONSTANT) for x in args])]

    return jax.make_jaxpr(inlined)(*(abstract(v.aval, v.aval.shape) for v in closed.jaxpr.invars))


def _branches(equation: Equation, operands: list[Value]) -> list[Value]:
    """A conditional: the branch that is known to be taken, else the choice among all of them.

    The predicate is the same for all examples; `jax.vmap` made one that is not a choice.
    """
    index, *arguments = operands
    branches = equation.params["branches"]
    if isinstance(index.array, jax.core.Tracer):
        every = [inline(branch, arguments) for branch in branches]
        return [_chosen(index, cases, v.aval) for cases, v in
                zip(zip(*every, strict=True), equation.outvars, strict=True)]  # fmt: skip
    return inline(branches[min(max(int(index.array), 0), len(branches) - 1)], arguments)


def _chosen(index: Value, cases: Sequence[Value], aval: Any) -> Value:
    arrays = [as_array(case.array, aval) for case in cases]
    at = jnp.clip(index.array, 0, len(arrays) - 1)
    at = at.astype(bool) if len(arrays) == 2 else at.astype(jnp.int32)
    role = joined([index.role, *(case.role for case in cases)])
    return Value(jax.lax.select_n(at, *arrays), role)


# Loops.


def _unroll(equation: Equation, operands: list[Value]) -> list[Value]:
    """The iterations of a scan, one after the other."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    # Where constants, states and slices begin is seen from their shapes: the
    # parameters that tell it differ between jax versions.
    sliced = _with_loop_axis(equation.invars, body.jaxpr.invars)
    stacked = _with_loop_axis(equation.outvars, body.jaxpr.outvars)
    states, rows = len(stacked) - sum(stacked), len(sliced) - sum(sliced)
    consts, carry, xs = operands[: rows - states], operands[rows - states : rows], operands[rows:]
    carry = _as_data(body.jaxpr, consts, carry, xs)
    steps, ys = range(length), {}
    for step in reversed(steps) if equation.params["reverse"] else steps:
        at_step = [Value(jax.lax.index_in_dim(x, step, keepdims=False), role) for x, role, _ in xs]
        results = inline(body, [*consts, *carry, *at_step])
        carry, ys[step] = results[:states], results[states:]
    columns = [[ys[step][k] for step in steps] for k in range(sum(stacked))]
    outs = equation.outvars[states:]
    return carry + [_stack(column, v.aval) for column, v in zip(columns, outs, strict=True)]


def _with_loop_axis(outside: Iterable[Any], inside: Iterable[Any]) -> list[bool]:
    pairs = zip(outside, inside, strict=True)
    return [len(a.aval.shape) > len(b.aval.shape) for a, b in pairs]


def _stack(column: list[Value], aval: Any) -> Value:
    if not column:
        return Value(jnp.zeros(aval.shape, aval.dtype), Role.CONSTANT)
    entry = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
    rows = [jax.lax.expand_dims(as_array(v.array, entry), (0,)) for v in column]
    return Value(jax.lax.concatenate(rows, 0), joined(v.role for v in column))


def _as_data(jaxpr: Any, consts: list[Value], carry: list[Value], xs: list[Value]) -> list[Value]:
    """The first states, those that are constant now and depend on data later as if they did now.

    A recurrent layer then meets its first state as it meets the others. That
    the barrier's result counts as data is known to the roles of the flat model.
    """
    later = _roles_in_loop(jaxpr, *([v.role for v in part] for part in (consts, carry, xs)))
    result = []
    for value, role, v in zip(carry, later, jaxpr.outvars, strict=False):
        is_float = jnp.issubdtype(v.aval.dtype, jnp.floating)
        if value.role is Role.CONSTANT and role >= Role.PASSIVE and is_float:
            array = jax.lax.optimization_barrier(as_array(value.array, v.aval))
            value = Value(array, Role.PASSIVE)
        result.append(value)
    return result


def _roles_in_loop(jaxpr: Any, consts: list[Role], carry: list[Role], xs: list[Role]) -> list[Role]:
    """What the states depend on after sufficiently many iterations."""
    while True:
        env = dict(zip(jaxpr.invars, [*consts, *carry, *xs], strict=True))
        for equation in jaxpr.eqns:
            role = joined(_role(env, atom) for atom in equation.invars)
            env.update(dict.fromkeys(equation.outvars, role))
        after = [joined((r, _role(env, v))) for r, v in zip(carry, jaxpr.outvars, strict=False)]
        if after == carry:
            return carry
        carry = after


def _role(env: dict[Var, Role], atom: Any) -> Role:
    return Role.CONSTANT if isinstance(atom, jex.Literal) else env.get(atom, Role.CONSTANT)
