"""What the values inside of a loop are made of, and loops of which parts are run."""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from kfgn.model.flatten.named_axis import Axis, trace
from kfgn.model.program.equations import (
    Equation,
    Var,
    as_array,
    evaluate,
    is_variable,
    read,
    variables,
)
from kfgn.model.program.primitives import draws


class Kind(enum.IntEnum):
    """What a value inside of a loop is made of; of several kinds, of the last."""

    FIXED = 0  # constants: the same in all iterations
    KNOWN = 1  # constants and the iteration
    DRAWN = 2  # random bits as well
    OPEN = 3  # examples or parameters


class Body(NamedTuple):
    """The body of a loop with the kinds of its values."""

    jaxpr: jex.Jaxpr
    constants: dict[Var, Any]
    kinds: dict[Var, Kind]

    def of(self, *kinds: Kind) -> list[Equation]:
        """The equations that make values of these kinds."""
        return [e for e in self.jaxpr.eqns if kind_of(e, self.kinds) in kinds]

    def border(self, kind: Kind) -> list[Var]:
        """The values of a kind that equations of another, or the body's outputs, read."""
        others = [e for e in self.jaxpr.eqns if kind_of(e, self.kinds) is not kind]
        found = [v for e in others for v in variables(e.invars)] + variables(self.jaxpr.outvars)
        return [v for v in dict.fromkeys(found) if self.kinds[v] is kind]


def kind_of(equation: Equation, kinds: dict[Var, Kind]) -> Kind:
    """The kind of what an equation makes; what has effects stays where the user put it."""
    if equation.effects:
        return Kind.OPEN
    found = max((kinds[v] for v in variables(equation.invars)), default=Kind.FIXED)
    return Kind.DRAWN if found is Kind.KNOWN and draws(equation) else found


def settled(jaxpr: jex.Jaxpr, start: Sequence[Kind], carried: range) -> dict[Var, Kind]:
    """The kinds of all values after sufficiently many iterations."""
    while True:
        kinds: dict[Var, Kind] = dict.fromkeys(jaxpr.constvars, Kind.FIXED)
        kinds |= dict(zip(jaxpr.invars, start, strict=True))
        for equation in jaxpr.eqns:
            kinds.update(dict.fromkeys(equation.outvars, kind_of(equation, kinds)))
        ends = [kinds[v] if is_variable(v) else Kind.FIXED for v in jaxpr.outvars]
        later = list(start)
        for k, end in zip(carried, ends, strict=False):
            later[k] = max(start[k], end)
        if later == start:
            return kinds
        start = later


def made_anew(
    closed: jex.ClosedJaxpr,
    make: Callable[[Equation, list[Any]], Sequence[Any]],
    axis: Axis | None = None,
) -> jex.ClosedJaxpr:
    """The same function, of which `make(equation, values)` evaluates each equation.

    It runs under `axis`, the axis of examples, if there is one.
    """
    jaxpr = closed.jaxpr

    def run(*args: Any) -> list[Any]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        for equation in jaxpr.eqns:
            found = make(equation, [read(env, atom) for atom in equation.invars])
            env.update(zip(equation.outvars, found, strict=True))
        return [as_array(read(env, v), v.aval) for v in jaxpr.outvars]

    return trace(run, axis, *(v.aval for v in jaxpr.invars))[0]


class PartLoop(NamedTuple):
    """A loop, of which parts are run."""

    params: dict[str, Any]
    body: Body
    ends: dict[Var, Any]  # of each state
    outside: dict[Var, Any]  # what the body is given, rows whole
    fixed: dict[Var, Any]  # what is the same in all iterations

    def run(
        self,
        equations: list[Equation],
        states: list[Var],
        rows: dict[Var, Any],
        outs: list[Any],
        evaluate: Callable[[list[Equation], dict[Var, Any]], None] = evaluate,
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
        candidates = self.body.of(Kind.KNOWN, Kind.OPEN)
        states = {v for v in self.ends if kinds[v] is Kind.OPEN}
        while True:
            outs = [*jaxpr.outvars[len(self.ends) :], *(self.ends[v] for v in states)]
            live, reads = [], set(variables(outs))
            for equation in reversed(candidates):
                if reads.intersection(equation.outvars) or equation.effects:
                    live.append(equation)
                    reads.update(variables(equation.invars))
            more = {v for v in self.ends if v in reads and kinds[v] is Kind.KNOWN} - states
            if not more:
                return live[::-1], [v for v in self.ends if v in states], reads
            states |= more
