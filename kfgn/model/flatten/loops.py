"""Loops that stay loops: a `scan` over parameters as one equation with a body to be read.

Values and gradients inside, of all iterations, have a leading axis `[T]`, which the
loop itself makes: see `evaluate_with`. A rematerialized region, as of `jax.checkpoint`, is
a loop that has one turn and no such axis.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.extend.core as jex

from kfgn.base.types import Array
from kfgn.model.program.equations import Equation, Var, as_array, read
from kfgn.model.program.thin import evaluate_thin, whole


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A `scan` whose body holds uses of parameters; the body takes constants, states, rows.

    Or a region that is rematerialized, of constants alone.
    """

    equation: Equation
    body: jex.Jaxpr
    constants: dict[Var, Any]  # that the body closes over

    @property
    def once(self) -> bool:
        """Whether it is a region that is rematerialized."""
        return self.equation.primitive.name != "scan"

    @property
    def length(self) -> int:
        return int(self.equation.params["length"])

    @property
    def reverse(self) -> bool:
        return bool(self.equation.params["reverse"])

    @property
    def order(self) -> range:
        """The iterations' places among the rows, in the order they are run."""
        return range(self.length)[:: -1 if self.reverse else 1]

    @property
    def parts(self) -> tuple[int, int]:
        """How many constants the body has, and how many states."""
        return (len(self.body.invars), 0) if self.once else counts_of(self.equation, self.body)


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """A value in the body of a loop, of all iterations together, `[T, ...]`."""

    loop: Loop
    var: Var
    aval: jax.ShapeDtypeStruct


Loops = Mapping[int, Loop]  # by the id of the equation, those in bodies included


def counts_of(equation: Equation, body: jex.Jaxpr) -> tuple[int, int]:
    """How many constants the body of a scan has, and how many states.

    That is seen from shapes: the parameters that tell it differ between jax versions.
    """

    def alike(outside: list[Any], inside: list[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    states = alike(equation.outvars, body.outvars)
    return alike(equation.invars, body.invars) - states, states


def innermost(variable: Var | Inside) -> Var:
    """The variable of the jaxpr itself."""
    while isinstance(variable, Inside):
        variable = variable.var
    return variable


def all_equations(jaxpr: jex.Jaxpr, loops: Loops) -> Iterable[tuple[Equation, tuple[Loop, ...]]]:
    """Every equation in order, with the loops around it, but for the loops themselves."""
    for equation in jaxpr.eqns:
        loop = loops.get(id(equation))
        if loop is None:
            yield equation, ()
        else:
            for inner, around in all_equations(loop.body, loops):
                yield inner, (loop, *around)


def evaluate_with(
    equations: Iterable[Equation],
    env: dict[Any, Any],
    loops: Loops,
    probes: Mapping[Any, Array],
    keep: Iterable[Any] = (),
) -> None:
    """Evaluates equations, and adds to the environment what is kept from inside of loops.

    Probes are added to the values that they are named by. Those in loops, `[T, ...]`,
    are further rows that the loop runs over, and what is kept further rows it makes.
    """
    for equation in equations:
        loop = loops.get(id(equation))
        if loop is None:
            evaluate_thin(equation, env)
        else:
            inner = {p: x for p, x in probes.items() if isinstance(p, Inside) and p.loop is loop}
            kept = [v for v in keep if isinstance(v, Inside) and v.loop is loop]
            operands = [whole(read(env, v), v) for v in equation.invars]
            values, rows = _run(loop, operands, loops, {p.var: x for p, x in inner.items()}, kept)
            env.update(zip([*equation.outvars, *kept], [*values, *rows], strict=True))
        env |= {v: whole(env[v], v) + probes[v] for v in equation.outvars if v in probes}


def _run(
    loop: Loop, operands: list[Any], loops: Loops, probes: dict[Any, Array], kept: list[Inside]
) -> tuple[list[Any], list[Any]]:
    """The loop's results, and the rows of what is kept."""
    consts, states = loop.parts
    body, options = loop.body, loop.equation.params
    avals = [v.aval for v in body.invars[consts : consts + states]]
    wanted = [v.var for v in kept]

    def turn(values: list[Any], added: list[Array]) -> tuple[list[Any], list[Any]]:
        env = {**loop.constants, **dict(zip(body.invars, values, strict=True))}
        evaluate_with(body.eqns, env, loops, dict(zip(probes, added, strict=True)), wanted)
        outs = [as_array(whole(read(env, v), v), v.aval) for v in body.outvars]
        return outs, [whole(env[v], v) for v in wanted]

    if loop.once:
        outs, found = rematerialized(turn, options)(operands, list(probes.values()))
        return outs, found

    def step(carry: list[Any], rows: tuple[list[Any], list[Any]]) -> tuple[Any, Any]:
        outs, found = turn([*operands[:consts], *carry, *rows[0]], rows[1])
        return outs[:states], (outs[states:], found)

    start = [as_array(x, a) for x, a in zip(operands[consts:], avals, strict=False)]
    carry, (outs, rows) = jax.lax.scan(
        step,
        start,
        (operands[consts + states :], list(probes.values())),
        length=loop.length,
        reverse=loop.reverse,
        unroll=options["unroll"],
    )
    return [*carry, *outs], rows


def rematerialized(function: Callable, options: Mapping[str, Any]) -> Callable:
    """The function under `jax.checkpoint`, as an equation of it has the options."""
    return jax.checkpoint(function, prevent_cse=options["prevent_cse"], policy=options["policy"])
