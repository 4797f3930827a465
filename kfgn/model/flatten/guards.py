"""Branches that data chooses, of which `jax.vmap` evaluates all: their parameters, unguarded.

To keep what a branch does with other examples out of derivatives, jax gives branch i each
operand w as `select_n(index == i, stop_gradient(w), w)`. Where the branch's results go through
case i of `select_n(index, ...)` alone, w itself has the same derivatives, and is a kernel,
where those of branches that are not taken are finite: a branch with a root or a logarithm,
which the choice may be there to protect, keeps its guard.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.extend.core as jex

from kfgn.model.program.equations import Equation, Role, Var, is_variable, variables
from kfgn.model.program.primitives import row_of

Makers = Mapping[Var, Equation]

# Beside sums and products, functions whose derivatives are finite wherever they are taken.
_TAME = (
    "abs atan asinh ceil clamp cos erf erfc floor logistic max min round sign sin square "
    "stop_gradient tanh reduce_max reduce_min eq ne lt le gt ge and or xor not"
)


def unguarded(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role]) -> jex.Jaxpr:
    """The same function, whose branches take parameters as they are."""
    makers = {v: e for e in jaxpr.eqns for v in e.outvars}
    names: dict[Var, Var] = {}
    for equation in jaxpr.eqns:
        parameter = _guarded(equation, makers, roles)
        if parameter is not None and _stays_in_branch(equation, jaxpr, makers):
            names[equation.outvars[0]] = parameter
    if not names:
        return jaxpr

    def renamed(atoms: Any) -> list[Any]:
        return [names.get(v, v) if is_variable(v) else v for v in atoms]

    equations = [e.replace(invars=renamed(e.invars)) for e in jaxpr.eqns]
    return jaxpr.replace(eqns=equations, outvars=renamed(jaxpr.outvars))


def _guarded(equation: Equation, makers: Makers, roles: Mapping[Var, Role]) -> Var | None:
    """The parameter w of `select_n(index == i, stop_gradient(w), w)`."""
    if equation.primitive.name != "select_n" or len(equation.invars) != 3:
        return None
    _, still, w = equation.invars
    maker = makers.get(still) if is_variable(still) else None
    if maker is None or maker.primitive.name != "stop_gradient" or maker.invars[0] is not w:
        return None
    return w if roles[w] is Role.PARAMETER else None


def _stays_in_branch(guard: Equation, jaxpr: jex.Jaxpr, makers: Makers) -> bool:
    """Whether all that is made of what is guarded goes through the branch's own case, tamely."""
    compared = makers.get(_origin(guard.invars[0], makers))
    if compared is None or compared.primitive.name != "eq":
        return False
    index, number = compared.invars
    if len(variables([index, number])) != 1 or not is_variable(index):
        return False
    made, which = {guard.outvars[0]}, _origin(index, makers)
    for equation in jaxpr.eqns:
        inside = [k for k, v in enumerate(equation.invars) if is_variable(v) and v in made]
        chooses = equation.primitive.name == "select_n" and inside == [1 + int(number.val)]
        if inside and not (chooses and _origin(equation.invars[0], makers) is which):
            if not _is_tame(equation, inside):
                return False
            made.update(equation.outvars)
    return made.isdisjoint(variables(jaxpr.outvars))


def _is_tame(equation: Equation, operands: Collection[int]) -> bool:
    """Whether its derivatives in these operands are finite at all finite values."""
    row = row_of(equation)
    if row.body:
        body = equation.params[row.body]
        return all(
            _is_tame(e, [k for k, v in enumerate(e.invars) if is_variable(v)])
            for e in getattr(body, "jaxpr", body).eqns
        )
    power = equation.params.get("y", 0) if equation.primitive.name == "integer_pow" else 0
    return (
        row.multilinear
        or all(k in row.linear_in for k in operands)
        or equation.primitive.name in _TAME.split()
        or power > 0
    )


def _origin(atom: Any, makers: Makers) -> Any:
    """What a value is, before its entries were moved or cast."""
    while is_variable(atom) and atom in makers and row_of(makers[atom]).moves is not None:
        atom = makers[atom].invars[0]
    return atom
