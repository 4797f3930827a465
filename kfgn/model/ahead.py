"""What loops make without the examples, such as noise, made ahead of them.

A loop that draws noise for its whole batch becomes two: the first draws, for all iterations, and
the second, which does all that meets examples, reads a row of that in each.
"""

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from kfgn.model.batch_noise import draws
from kfgn.model.equations import (
    Equation,
    Var,
    abstract,
    as_array,
    bind,
    evaluate,
    is_variable,
    read,
    variables,
)
from kfgn.model.loops import counts_of, rematerialized
from kfgn.model.primitives import REMAT


class _Kind(enum.IntEnum):
    """What a value inside of a loop is made of; of several kinds, of the last."""

    FIXED = 0  # constants: the same in all iterations
    KNOWN = 1  # constants and the iteration
    DRAWN = 2  # random bits as well
    OPEN = 3  # examples or parameters


class _Body(NamedTuple):
    """The body of a loop with the kinds of its values."""

    jaxpr: jex.Jaxpr
    constants: dict[Var, Any]
    kinds: dict[Var, _Kind]

    def of(self, *kinds: _Kind) -> list[Equation]:
        return [e for e in self.jaxpr.eqns if _kind(e, self.kinds) in kinds]

    def border(self, kind: _Kind) -> list[Var]:
        """The values of a kind that equations of another, or the body's outputs, read."""
        others = [e for e in self.jaxpr.eqns if _kind(e, self.kinds) is not kind]
        found = [v for e in others for v in variables(e.invars)] + variables(self.jaxpr.outvars)
        return [v for v in dict.fromkeys(found) if self.kinds[v] is kind]


def made_ahead(closed: jex.ClosedJaxpr, known: Sequence[bool]) -> jex.ClosedJaxpr:
    """The same function, whose loops and rematerialized regions make no constants or noise.

    Args:
      closed: flat, with flat bodies.
      known: whether each argument is a constant.
    """
    jaxpr = closed.jaxpr

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        constant = {*jaxpr.constvars, *(v for v, k in zip(jaxpr.invars, known, strict=True) if k)}
        for equation in jaxpr.eqns:
            values = [read(env, atom) for atom in equation.invars]
            flags = [not is_variable(atom) or atom in constant for atom in equation.invars]
            if all(flags) and not equation.effects:
                constant.update(equation.outvars)
                found = bind(equation, values)
            elif equation.primitive.name == "scan":
                found = _loop(equation, values, flags)
            elif equation.primitive.name in REMAT:
                found = _region(equation, values, flags)
            else:
                found = bind(equation, values)
            env.update(zip(equation.outvars, found, strict=True))
        return [as_array(read(env, v), v.aval) for v in jaxpr.outvars]

    return jax.make_jaxpr(run)(*(abstract(v.aval, v.aval.shape) for v in jaxpr.invars))


def _kind(equation: Equation, kinds: dict[Var, _Kind]) -> _Kind:
    if equation.effects:
        return _Kind.OPEN
    found = max((kinds[v] for v in variables(equation.invars)), default=_Kind.FIXED)
    return _Kind.DRAWN if found is _Kind.KNOWN and draws(equation) else found


def _body(equation: Equation, start: Sequence[_Kind], carried: range = range(0)) -> _Body:
    """The body with the loops inside of it made anew, and the kinds of its values."""
    inner = equation.params["jaxpr"]
    if not isinstance(inner, jex.ClosedJaxpr):
        inner = jex.ClosedJaxpr(inner, ())
    kinds = _settled(inner.jaxpr, start, carried)
    again = made_ahead(inner, [kinds[v] is not _Kind.OPEN for v in inner.jaxpr.invars])
    constants = dict(zip(again.jaxpr.constvars, again.consts, strict=True))
    return _Body(again.jaxpr, constants, _settled(again.jaxpr, start, carried))


def _settled(jaxpr: jex.Jaxpr, start: Sequence[_Kind], carried: range) -> dict[Var, _Kind]:
    """The kinds of all values after sufficiently many iterations."""
    while True:
        kinds: dict[Var, _Kind] = dict.fromkeys(jaxpr.constvars, _Kind.FIXED)
        kinds |= dict(zip(jaxpr.invars, start, strict=True))
        for equation in jaxpr.eqns:
            kinds.update(dict.fromkeys(equation.outvars, _kind(equation, kinds)))
        ends = [kinds[v] if is_variable(v) else _Kind.FIXED for v in jaxpr.outvars]
        later = list(start)
        for k, end in zip(carried, ends, strict=False):
            later[k] = max(start[k], end)
        if later == start:
            return kinds
        start = later


def _region(equation: Equation, values: list[Any], flags: list[bool]) -> list[Any]:
    """A rematerialized region whose constants are made outside of it."""
    body = _body(equation, [_Kind.FIXED if flag else _Kind.OPEN for flag in flags])
    fixed = body.of(_Kind.FIXED)
    if not fixed:
        return bind(equation, values)
    env = {**body.constants, **dict(zip(body.jaxpr.invars, values, strict=True))}
    evaluate(fixed, env)
    given = [*body.jaxpr.invars, *body.border(_Kind.FIXED)]
    rest = body.of(_Kind.OPEN)

    def region(*arrays: Any) -> list[Any]:
        inside = {**body.constants, **dict(zip(given, arrays, strict=True))}
        evaluate(rest, inside)
        return [as_array(read(inside, v), v.aval) for v in body.jaxpr.outvars]

    return rematerialized(region, equation.params)(*(env[v] for v in given))


class _Loop(NamedTuple):
    """A loop, of which parts are run."""

    params: dict[str, Any]
    body: _Body
    ends: dict[Var, Any]  # of each state
    outside: dict[Var, Any]  # what the body is given, rows whole
    fixed: dict[Var, Any]  # what is the same in all iterations

    def run(
        self, equations: list[Equation], states: list[Var], rows: dict[Var, Any], outs: list[Any]
    ) -> tuple[dict[Var, Any], list[Any]]:
        """The last values of some states, and rows of `outs`."""

        def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            env = {**self.fixed, **dict(zip(states, carry, strict=True))}
            env.update(zip(rows, row, strict=True))
            evaluate(equations, env)
            after = [as_array(read(env, self.ends[v]), v.aval) for v in states]
            return after, [as_array(read(env, v), v.aval) for v in outs]

        start = [as_array(self.outside[v], v.aval) for v in states]
        options = {k: self.params[k] for k in ("length", "reverse", "unroll")}
        last, found = jax.lax.scan(step, start, list(rows.values()), **options)
        return dict(zip(states, last, strict=True)), found

    def needed(self) -> tuple[list[Equation], list[Var], set[Var]]:
        """What the loop has to evaluate that draws no more, its states, and all that it reads."""
        jaxpr, kinds = self.body.jaxpr, self.body.kinds
        candidates = self.body.of(_Kind.KNOWN, _Kind.OPEN)
        states = {v for v in self.ends if kinds[v] is _Kind.OPEN}
        while True:
            outs = [*jaxpr.outvars[len(self.ends) :], *(self.ends[v] for v in states)]
            live, reads = [], set(variables(outs))
            for equation in reversed(candidates):
                if reads.intersection(equation.outvars) or equation.effects:
                    live.append(equation)
                    reads.update(variables(equation.invars))
            more = {v for v in self.ends if v in reads and kinds[v] is _Kind.KNOWN} - states
            if not more:
                return live[::-1], [v for v in self.ends if v in states], reads
            states |= more


def _loop(equation: Equation, values: list[Any], flags: list[bool]) -> list[Any]:
    """A loop after another that makes what needs no example."""
    consts, states = counts_of(equation, equation.params["jaxpr"].jaxpr)
    start = [
        _Kind.OPEN if not flag else _Kind.FIXED if k < consts else _Kind.KNOWN
        for k, flag in enumerate(flags)
    ]
    body = _body(equation, start, range(consts, consts + states))
    jaxpr, border = body.jaxpr, body.border(_Kind.DRAWN)
    if not border and not body.of(_Kind.FIXED):
        return bind(equation, values)
    outside = dict(zip(jaxpr.invars, values, strict=True))
    fixed = {**body.constants, **{v: outside[v] for v in jaxpr.invars[:consts]}}
    evaluate(body.of(_Kind.FIXED), fixed)
    ends = dict(zip(jaxpr.invars[consts : consts + states], jaxpr.outvars, strict=False))
    loop = _Loop(equation.params, body, ends, outside, fixed)
    rows = {v: outside[v] for v in jaxpr.invars[consts + states :]}
    known = {v: x for v, x in rows.items() if body.kinds[v] is not _Kind.OPEN}
    kept = [v for v in ends if body.kinds[v] is not _Kind.OPEN]
    made, drawn = loop.run(body.of(_Kind.KNOWN, _Kind.DRAWN), kept, known, border)
    equations, kept, reads = loop.needed()
    rows = {v: x for v, x in rows.items() if v in reads} | dict(zip(border, drawn, strict=True))
    last, outs = loop.run(equations, kept, rows, list(jaxpr.outvars[states:]))
    return [*({**last, **made}[v] for v in ends), *outs]
