"""Inlining: a jaxpr evaluated anew, without calls, or, on request, loops over parameters.

It runs under a second trace, whose equations are then flat; so are those in the
bodies of loops over parameters that stay. Every value carries along what it depends
on: what depends on no parameter is never differentiated, and keeps its loops and its rules.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import LoopError
from kfgn.model.flatten.complex_parts import Parts, joined_parts, parts_of, product_with_parts
from kfgn.model.flatten.custom_vjp import check_linear
from kfgn.model.flatten.loops import counts_of, rematerialized
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    abstract,
    as_array,
    axis_names,
    bind,
    count_equations,
    is_complex,
    is_differentiated,
    is_variable,
    joined,
    role_of,
)
from kfgn.model.program.primitives import REMAT, row_of


class Value(NamedTuple):
    """A traced array, and what it depends on."""

    array: Any
    role: Role
    parts: Parts | None = None  # real and imaginary, of a complex value made of parameters


def inline(
    body: Any, arguments: Sequence[Value], bind: Callable = bind, unroll: bool = True
) -> list[Value]:
    """Evaluates a jaxpr, or closed jaxpr, equation by equation, going into calls and loops.

    `bind(equation, arrays)` evaluates what is kept as a single equation. Without `unroll`,
    loops of more than one iteration stay, with flat bodies.
    """
    jaxpr, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
    env = {v: Value(c, Role.CONSTANT) for v, c in zip(jaxpr.constvars, consts, strict=True)}
    env.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        results = _evaluate(equation, [_value(env, atom) for atom in equation.invars], bind, unroll)
        env.update(zip(equation.outvars, results, strict=True))
    return [_value(env, atom) for atom in jaxpr.outvars]


def _value(env: dict[Var, Value], atom: Any) -> Value:
    return env[atom] if is_variable(atom) else Value(atom.val, Role.CONSTANT)


def _evaluate(
    equation: Equation, operands: list[Value], bind: Callable, unroll: bool
) -> list[Value]:
    row, name = row_of(equation), equation.primitive.name
    if name in REMAT and not unroll and _differentiated(operands) and _is_region(equation):
        return _flat_region(equation, operands)
    if row.inlined and row.body in equation.params:
        return inline(equation.params[row.body], operands, bind, unroll)
    if name == "cond" and _differentiated(operands):
        return _branches(equation, operands, unroll)
    if name == "dot_general" and any(map(_is_number, operands)):
        return _product_with_number(equation, operands)
    if name == "scan" and _differentiated(operands):
        # Statistics of the batch are the same for all examples, not for all iterations.
        if unroll or equation.params["length"] < 2 or axis_names(equation):
            return _unroll(equation, operands, unroll)
        return _flat_loop(equation, operands)
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


def _branches(equation: Equation, operands: list[Value], unroll: bool) -> list[Value]:
    """A conditional: the branch that is known to be taken, else the choice among all of them.

    The predicate is the same for all examples; `jax.vmap` made one that is not a choice.
    """
    index, *arguments = operands
    branches = equation.params["branches"]
    if isinstance(index.array, jax.core.Tracer):
        every = [inline(branch, arguments, unroll=unroll) for branch in branches]
        return [_chosen(index, cases, v.aval) for cases, v in
                zip(zip(*every, strict=True), equation.outvars, strict=True)]  # fmt: skip
    taken = branches[min(max(int(index.array), 0), len(branches) - 1)]
    return inline(taken, arguments, unroll=unroll)


def _chosen(index: Value, cases: Sequence[Value], aval: Any) -> Value:
    arrays = [as_array(case.array, aval) for case in cases]
    at = jnp.clip(index.array, 0, len(arrays) - 1)
    at = at.astype(bool) if len(arrays) == 2 else at.astype(jnp.int32)
    role = joined([index.role, *(case.role for case in cases)])
    return Value(jax.lax.select_n(at, *arrays), role)


# Loops.

# Beyond so many equations an unrolled loop would compile for minutes.
MOST_EQUATIONS = 6_000


def _flat_loop(equation: Equation, operands: list[Value]) -> list[Value]:
    """The same loop with a flat body."""
    body, options = equation.params["jaxpr"], equation.params
    consts, carry, xs = _split(equation, operands)
    later = _roles_in_loop(body.jaxpr, *([v.role for v in part] for part in (consts, carry, xs)))
    inside = [*later, *(x.role for x in xs)]
    roles: list[Role] = []

    def step(states: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        results = inline(body, [*consts, *map(Value, [*states, *rows], inside)], unroll=False)
        roles[:] = [v.role for v in results]
        outs = _arrays(results, body.jaxpr.outvars)
        return outs[: len(carry)], outs[len(carry) :]

    given = _arrays(operands, equation.invars)[len(consts) :]
    states, rows = jax.lax.scan(
        step,
        given[: len(carry)],
        given[len(carry) :],
        length=options["length"],
        reverse=options["reverse"],
        unroll=options["unroll"],
    )
    return list(map(Value, [*states, *rows], [*later, *roles[len(carry) :]]))


def _is_region(equation: Equation) -> bool:
    """Not what repeats a forward pass, as in derivatives by the inputs: it is computed once."""
    return not equation.effects and not equation.params["differentiated"]


def _flat_region(equation: Equation, operands: list[Value]) -> list[Value]:
    """The same rematerialized region with a flat body."""
    body, inside, roles = equation.params["jaxpr"], [v.role for v in operands], list[Role]()

    def region(*arrays: Any) -> list[Any]:
        results = inline(body, list(map(Value, arrays, inside)), unroll=False)
        roles[:] = [v.role for v in results]
        return _arrays(results, body.outvars)

    arrays = _arrays(operands, equation.invars)
    return list(map(Value, rematerialized(region, equation.params)(*arrays), roles))


def _arrays(values: Iterable[Value], atoms: Iterable[Any]) -> list[Any]:
    return [as_array(v.array, a.aval) for v, a in zip(values, atoms, strict=True)]


def _split(equation: Equation, operands: list[Value]) -> tuple[list[Value], ...]:
    """Constants, states and slices."""
    consts, states = counts_of(equation, equation.params["jaxpr"].jaxpr)
    return operands[:consts], operands[consts : consts + states], operands[consts + states :]


def _unroll(equation: Equation, operands: list[Value], unroll: bool) -> list[Value]:
    """The iterations of a scan, one after the other."""
    body, length = equation.params["jaxpr"], equation.params["length"]
    _check_length(equation)
    consts, carry, xs = _split(equation, operands)
    states = len(carry)
    carry = _as_data(body.jaxpr, consts, carry, xs)
    steps, ys = range(length), {}
    for step in reversed(steps) if equation.params["reverse"] else steps:
        at_step = [Value(jax.lax.index_in_dim(x, step, keepdims=False), role) for x, role, _ in xs]
        results = inline(body, [*consts, *carry, *at_step], unroll=unroll)
        carry, ys[step] = results[:states], results[states:]
    outs = equation.outvars[states:]
    columns = [[ys[step][k] for step in steps] for k in range(len(outs))]
    return carry + [_stack(column, v.aval) for column, v in zip(columns, outs, strict=True)]


def _check_length(equation: Equation) -> None:
    count = count_equations([equation])
    if count > MOST_EQUATIONS:
        raise LoopError(
            f"the model has a loop of {equation.params['length']} iterations over parameters, "
            f"which this method goes through one by one: {count:,} equations, expected at most "
            f'{MOST_EQUATIONS:,}. The methods "kfac", "kflr" and "empirical", and matvec of the '
            "exact matrices, keep loops as they are, but those with statistics of the batch inside."
        )


def _stack(column: list[Value], aval: Any) -> Value:
    if not column:
        return Value(jnp.zeros(aval.shape, aval.dtype), Role.CONSTANT)
    entry = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
    rows = [jax.lax.expand_dims(as_array(v.array, entry), (0,)) for v in column]
    return Value(jax.lax.concatenate(rows, 0), joined(v.role for v in column))


def _as_data(jaxpr: Any, consts: list[Value], carry: list[Value], xs: list[Value]) -> list[Value]:
    """The first states, those that depend on data later only as if they did now.

    A recurrent layer then meets its first state as it meets the others. That the barrier's
    result counts as data is known to the roles of the flat model, and of a state that
    is made of parameters seen from data beside it.
    """
    later = _roles_in_loop(jaxpr, *([v.role for v in part] for part in (consts, carry, xs)))
    data = [x for x in (*consts, *carry, *xs) if x.role >= Role.PASSIVE]
    result = []
    for value, role, v in zip(carry, later, jaxpr.outvars, strict=False):
        is_float = jnp.issubdtype(v.aval.dtype, jnp.floating)
        if value.role <= Role.PARAMETER and role >= Role.PASSIVE and is_float:
            array = as_array(value.array, v.aval)
            if value.role is Role.CONSTANT:
                value = Value(jax.lax.optimization_barrier(array), Role.PASSIVE)
            else:
                beside = jax.lax.stop_gradient(data[0].array)
                value = Value(jax.lax.optimization_barrier((array, beside))[0], Role.ACTIVE)
        result.append(value)
    return result


def _roles_in_loop(jaxpr: Any, consts: list[Role], carry: list[Role], xs: list[Role]) -> list[Role]:
    """What the states depend on after sufficiently many iterations."""
    while True:
        env = dict(zip(jaxpr.invars, [*consts, *carry, *xs], strict=True))
        env.update(dict.fromkeys(jaxpr.constvars, Role.CONSTANT))
        for equation in jaxpr.eqns:
            role = joined(role_of(env, atom) for atom in equation.invars)
            env.update(dict.fromkeys(equation.outvars, role))
        after = [joined((r, role_of(env, v))) for r, v in zip(carry, jaxpr.outvars, strict=False)]
        if after == carry:
            return carry
        carry = after
