"""Two annotations of a flat jaxpr: what each value depends on, and what depends on it."""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.model.flatten.loops import Loop, Loops
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    axis_names,
    is_differentiated,
    joined,
    role_of,
    variables,
)

# How many of the last iterations of each loop around a value do without it.
Late = dict[Loop, int]


def assign_roles(
    jaxpr: jex.Jaxpr,
    parameters: Iterable[Var],
    inputs: Iterable[Var],
    loops: Loops,
    forced: dict[Var, Role] | None = None,
    axis_name: Hashable | None = None,
) -> dict[Var, Role]:
    """What every value depends on, in loops after sufficiently many iterations."""
    forced = forced or {}
    roles = dict.fromkeys(parameters, Role.PARAMETER)
    roles.update(dict.fromkeys(inputs, Role.PASSIVE))
    roles.update(forced)
    _assign(jaxpr, roles, loops, forced, axis_name)
    return roles


def _assign(
    jaxpr: jex.Jaxpr,
    roles: dict[Var, Role],
    loops: Loops,
    forced: dict[Var, Role],
    axis_name: Hashable | None = None,
) -> None:
    for v in jaxpr.constvars:
        roles[v] = forced.get(v, Role.CONSTANT)
    for equation in jaxpr.eqns:
        role = joined(roles[v] for v in variables(equation.invars))
        found = [role] * len(equation.outvars)
        if id(equation) in loops:
            found = _assign_in(loops[id(equation)], roles, loops, forced)
        elif role is Role.CONSTANT and equation.primitive.name == "optimization_barrier":
            # A recurrent layer's first state is data like the later ones, so that
            # `state @ W` is the same kind of use at every step. It is always
            # correct to treat a constant as data.
            found = [Role.PASSIVE] * len(found)
        if axis_name in axis_names(equation):
            found = [Role.PASSIVE] * len(found)  # statistics, which are constants, as data are
        for out, role in zip(equation.outvars, found, strict=True):
            roles[out] = forced.get(out, _without_derivative(role, equation, out))


def _assign_in(
    loop: Loop, roles: dict[Var, Role], loops: Loops, forced: dict[Var, Role]
) -> list[Role]:
    """The roles of a loop's results, once those in its body do not change any more."""
    body, (consts, states) = loop.body, loop.parts
    found = [role_of(roles, atom) for atom in loop.equation.invars]
    while True:
        pairs = zip(body.invars, found, strict=True)
        roles.update({v: forced.get(v, _without_derivative(r, loop.equation, v)) for v, r in pairs})
        _assign(body, roles, loops, forced)
        outs = [role_of(roles, v) for v in body.outvars]
        after = [joined(pair) for pair in zip(found[consts:], outs[:states], strict=False)]
        if after == found[consts : consts + states]:
            return after + outs[states:]
        found[consts : consts + states] = after


# Their derivative is zero.
_FLAT = ("stop_gradient", "round", "floor", "ceil", "sign")


def _without_derivative(role: Role, equation: Equation, out: Var) -> Role:
    differentiable = jnp.issubdtype(out.aval.dtype, jnp.inexact) and out.aval.size > 0
    if differentiable and equation.primitive.name not in _FLAT:
        return role
    if role is Role.ACTIVE:
        return Role.PASSIVE
    return Role.CONSTANT if role is Role.PARAMETER else role


def reached_values(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role], loops: Loops) -> dict[Var, Late]:
    """The values that the outputs depend on differentiably."""
    found: dict[Var, Late] = {}

    def differentiated(atoms: Iterable[Any]) -> set[Var]:
        return {v for v in variables(atoms) if is_differentiated(roles[v])}

    def reach(jaxpr: jex.Jaxpr, wanted: set[Var], late: Late) -> set[Var]:
        reached = set(wanted)
        for equation in reversed(jaxpr.eqns):
            if not reached.intersection(equation.outvars):
                continue
            atoms = equation.invars
            if (loop := loops.get(id(equation))) is not None:
                inside = reach_in(loop, reached, late)
                atoms = [a for a, v in zip(atoms, loop.body.invars, strict=True) if v in inside]
            reached |= differentiated(atoms)
        for v in reached:
            found.setdefault(v, late)
        return reached

    def reach_in(loop: Loop, reached: set[Var], late: Late) -> set[Var]:
        """What is reached in an early iteration, found from the last one backwards."""
        body, (consts, states), count = loop.body, loop.parts, 0
        outs = zip(body.outvars, loop.equation.outvars, strict=True)
        wanted = differentiated(v for v, out in outs if out in reached)
        while True:
            inside = reach(body, wanted, {**late, loop: count})
            carried = zip(body.outvars[:states], body.invars[consts:], strict=False)
            before = wanted | differentiated(out for out, v in carried if v in inside)
            if before == wanted:
                return inside
            wanted, count = before, count + 1

    reach(jaxpr, differentiated(jaxpr.outvars), {})
    return found
