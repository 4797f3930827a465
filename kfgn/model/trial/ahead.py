"""What loops make without the examples, such as noise, made ahead of them.

A loop that draws noise for its whole batch becomes two: the first draws, for all iterations, and
the second, which does all that meets examples, reads a row of that in each.
"""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from kfgn.model.flatten.iterations import Body, Kind, PartLoop, made_anew, settled
from kfgn.model.flatten.loops import counts_of, rematerialized
from kfgn.model.program.equations import (
    Equation,
    as_array,
    bind,
    evaluate,
    is_variable,
    read,
)
from kfgn.model.program.primitives import REMAT


def made_ahead(closed: jex.ClosedJaxpr, known: Sequence[bool]) -> jex.ClosedJaxpr:
    """The same function, whose loops and rematerialized regions make no constants or noise.

    Args:
      closed: flat, with flat bodies.
      known: whether each argument is a constant.
    """
    jaxpr = closed.jaxpr
    constant = {*jaxpr.constvars, *(v for v, k in zip(jaxpr.invars, known, strict=True) if k)}

    def make(equation: Equation, values: list[Any]) -> Sequence[Any]:
        flags = [not is_variable(atom) or atom in constant for atom in equation.invars]
        if all(flags) and not equation.effects:
            constant.update(equation.outvars)
        elif equation.primitive.name == "scan":
            return _loop(equation, values, flags)
        elif equation.primitive.name in REMAT:
            return _region(equation, values, flags)
        return bind(equation, values)

    return made_anew(closed, make)


def _body(equation: Equation, start: Sequence[Kind], carried: range = range(0)) -> Body:
    """The body with the loops inside of it made anew, and the kinds of its values."""
    inner = equation.params["jaxpr"]
    if not isinstance(inner, jex.ClosedJaxpr):
        inner = jex.ClosedJaxpr(inner, ())
    kinds = settled(inner.jaxpr, start, carried)
    again = made_ahead(inner, [kinds[v] is not Kind.OPEN for v in inner.jaxpr.invars])
    constants = dict(zip(again.jaxpr.constvars, again.consts, strict=True))
    return Body(again.jaxpr, constants, settled(again.jaxpr, start, carried))


def _region(equation: Equation, values: list[Any], flags: list[bool]) -> list[Any]:
    """A rematerialized region whose constants are made outside of it."""
    body = _body(equation, [Kind.FIXED if flag else Kind.OPEN for flag in flags])
    fixed = body.of(Kind.FIXED)
    if not fixed:
        return bind(equation, values)
    env = {**body.constants, **dict(zip(body.jaxpr.invars, values, strict=True))}
    evaluate(fixed, env)
    given = [*body.jaxpr.invars, *body.border(Kind.FIXED)]
    rest = body.of(Kind.OPEN)

    def region(*arrays: Any) -> list[Any]:
        inside = {**body.constants, **dict(zip(given, arrays, strict=True))}
        evaluate(rest, inside)
        return [as_array(read(inside, v), v.aval) for v in body.jaxpr.outvars]

    return rematerialized(region, equation.params)(*(env[v] for v in given))


def _loop(equation: Equation, values: list[Any], flags: list[bool]) -> list[Any]:
    """A loop after another that makes what needs no example."""
    consts, states = counts_of(equation, equation.params["jaxpr"].jaxpr)
    start = [
        Kind.OPEN if not flag else Kind.FIXED if k < consts else Kind.KNOWN
        for k, flag in enumerate(flags)
    ]
    body = _body(equation, start, range(consts, consts + states))
    jaxpr, border = body.jaxpr, body.border(Kind.DRAWN)
    if not border and not body.of(Kind.FIXED):
        return bind(equation, values)
    outside = dict(zip(jaxpr.invars, values, strict=True))
    fixed = {**body.constants, **{v: outside[v] for v in jaxpr.invars[:consts]}}
    evaluate(body.of(Kind.FIXED), fixed)
    ends = dict(zip(jaxpr.invars[consts : consts + states], jaxpr.outvars, strict=False))
    loop = PartLoop(equation.params, body, ends, outside, fixed)
    rows = {v: outside[v] for v in jaxpr.invars[consts + states :]}
    known = {v: x for v, x in rows.items() if body.kinds[v] is not Kind.OPEN}
    kept = [v for v in ends if body.kinds[v] is not Kind.OPEN]
    made, drawn = loop.run(body.of(Kind.KNOWN, Kind.DRAWN), kept, known, border)
    equations, kept, reads = loop.needed()
    rows = {v: x for v, x in rows.items() if v in reads} | dict(zip(border, drawn, strict=True))
    last, outs = loop.run(equations, kept, rows, list(jaxpr.outvars[states:]))
    return [*({**last, **made}[v] for v in ends), *outs]
