"""Loops that read stacks by the iteration's number, made into loops over the stacks' rows.

In `fori_loop(0, T, lambda t, h: tanh(h @ W[t]), x)` every iteration has a kernel of its own, as
it has in `scan(lambda h, w: (tanh(h @ w), None), x, W)`. Read as the latter, the loop stays one.
Which row an iteration reads is found by running what counts them, where that is known.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.model.flatten.iterations import Body, Kind, PartLoop, made_anew, settled
from kfgn.model.flatten.loops import counts_of, rematerialized
from kfgn.model.flatten.named_axis import Axis
from kfgn.model.program.equations import (
    Equation,
    Var,
    as_array,
    bind,
    bind_known,
    bodies,
    evaluate,
    is_variable,
    read,
    variables,
)
from kfgn.model.program.primitives import REMAT

# What counts iterations is small.
_MOST_ENTRIES = 100_000


def over_rows(closed: jex.ClosedJaxpr, axis: Axis | None = None) -> jex.ClosedJaxpr:
    """The same function, whose loops go over the rows of stacks that they read by number.

    Args:
      closed: flat, with flat bodies.
      axis: of examples, with a name, that it runs under.
    """
    if not any(map(_reads_inside, closed.jaxpr.eqns)):
        return closed
    consts = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    numbers = {v: x for v, x in consts if _is_number(v, x)}

    def make(equation: Equation, values: list[Any]) -> Sequence[Any]:
        if equation.primitive.name == "scan":
            return _loop(equation, values, numbers)
        if equation.primitive.name in REMAT and not equation.effects:
            return _region(equation, values, [])
        _count(equation, numbers)
        return bind(equation, values)

    return made_anew(closed, make, axis)


def _reads_inside(equation: Equation) -> bool:
    inner = [e for body in bodies(equation) for e in body.eqns]
    loops = equation.primitive.name in ("scan", *REMAT)
    return loops and any(_row_axis(e) is not None or _reads_inside(e) for e in inner)


def _row_axis(equation: Equation) -> int | None:
    """The axis of which an equation reads one row, at a number that an operand has."""
    name, options = equation.primitive.name, equation.params
    if name not in ("dynamic_slice", "gather") or not is_variable(equation.invars[0]):
        return None
    shape, sizes = equation.invars[0].aval.shape, options["slice_sizes"]
    short = [k for k, (n, size) in enumerate(zip(shape, sizes, strict=True)) if size < n]
    if len(short) != 1 or sizes[short[0]] != 1:
        return None
    if name == "gather":
        numbers, index = options["dimension_numbers"], equation.invars[1].aval.shape
        if numbers.operand_batching_dims or numbers.start_index_map != (short[0],) or index != (1,):
            return None
    return short[0]


def _number(equation: Equation) -> Any:
    """The operand that is the number of the row."""
    axis = _row_axis(equation)
    assert axis is not None
    return equation.invars[1 + axis if equation.primitive.name == "dynamic_slice" else 1]


# Numbers: what is known before the loops run.


def _is_number(variable: Var, value: Any) -> bool:
    counts = jnp.issubdtype(variable.aval.dtype, jnp.integer) or variable.aval.dtype == bool
    small = variable.aval.size <= _MOST_ENTRIES
    return bool(counts and small and not isinstance(value, jax.core.Tracer))


def _known(atom: Any, numbers: dict[Var, Any]) -> Any:
    """The value of a number, or None."""
    return numbers.get(atom) if is_variable(atom) else atom.val


def _count(equation: Equation, numbers: dict[Var, Any]) -> None:
    """Adds what an equation makes of numbers alone."""
    if equation.effects or not all(_is_number(v, None) for v in equation.outvars):
        return
    values = [_known(atom, numbers) for atom in equation.invars]
    if not any(value is None for value in values):
        with jax.ensure_compile_time_eval():
            numbers.update(zip(equation.outvars, bind_known(equation, values), strict=True))


def _evaluate_numbers(equations: Iterable[Equation], env: dict[Var, Any]) -> None:
    for equation in equations:
        found = bind_known(equation, [read(env, atom) for atom in equation.invars])
        env.update(zip(equation.outvars, found, strict=True))


# Loops.


def _loop(equation: Equation, values: list[Any], numbers: dict[Var, Any]) -> list[Any]:
    inner = over_rows(equation.params["jaxpr"])
    consts, states = counts_of(equation, inner.jaxpr)
    known = [_known(atom, numbers) for atom in equation.invars]
    start = [
        Kind.OPEN if x is None else Kind.FIXED if k < consts else Kind.KNOWN
        for k, x in enumerate(known)
    ]
    carried = range(consts, consts + states)
    inner = _with_regions_read(inner, settled(inner.jaxpr, start, carried))
    jaxpr = inner.jaxpr
    constants = dict(zip(jaxpr.constvars, inner.consts, strict=True))
    body = Body(jaxpr, constants, settled(jaxpr, start, carried))
    ends = dict(zip(jaxpr.invars[consts : consts + states], jaxpr.outvars, strict=False))

    def loop(given: Sequence[Any]) -> PartLoop:
        outside = dict(zip(jaxpr.invars, given, strict=True))
        fixed = {**constants, **{v: outside[v] for v in jaxpr.invars[:consts]}}
        return PartLoop(equation.params, body, ends, outside, fixed)

    reads = _reads(jaxpr.eqns, set(jaxpr.invars[:consts]), body.kinds)
    with jax.ensure_compile_time_eval():
        rows = _numbers_of(reads, loop(known), jaxpr.invars[consts + states :])
    own = loop(values)
    taken = {
        e.outvars[0]: found.reshape(-1, *e.outvars[0].aval.shape)
        for e, number in zip(reads, rows, strict=True)
        if (found := _rows(own.outside[e.invars[0]], number, _row_axis(e))) is not None
    }
    given = {v: own.outside[v] for v in jaxpr.invars[consts + states :]} | taken
    rest = [e for e in jaxpr.eqns if taken.keys().isdisjoint(e.outvars)]
    last, outs = own.run(rest, list(ends), given, list(jaxpr.outvars[states:]))
    return [*last.values(), *outs]


def _reads(equations: Iterable[Equation], stacks: set[Var], kinds: dict[Var, Kind]) -> list[Any]:
    """The equations that read a row of a stack at a number that is known in each iteration."""
    return [
        e
        for e in equations
        if _row_axis(e) is not None
        and e.invars[0] in stacks
        and kinds[e.invars[0]] is Kind.OPEN
        and all(kinds[v] <= Kind.KNOWN for v in variables(e.invars[1:]))
    ]


def _makers(equations: Sequence[Equation], needed: Iterable[Var]) -> list[Equation]:
    """The equations that some values are made by, in order."""
    needed, found = set(needed), []
    for equation in reversed(equations):
        if needed.intersection(equation.outvars):
            found.append(equation)
            needed.update(variables(equation.invars))
    return found[::-1]


def _numbers_of(reads: list[Equation], loop: PartLoop, rows: list[Var]) -> list[np.ndarray]:
    """The number of the row of each iteration, for every equation."""
    if not reads:
        return []
    body, outs = loop.body, [_number(e) for e in reads]
    needed = set(variables(outs))
    while True:  # also what states become that they are made of
        before = len(needed)
        needed.update(*(variables(e.invars) for e in _makers(body.jaxpr.eqns, needed)))
        needed.update(variables(end for v, end in loop.ends.items() if v in needed))
        if len(needed) == before:
            break
    fixed = [e for e in body.of(Kind.FIXED) if needed.intersection(e.outvars)]
    _evaluate_numbers(fixed, loop.fixed)
    _, found = loop.run(
        [e for e in body.of(Kind.KNOWN) if needed.intersection(e.outvars)],
        [v for v in loop.ends if v in needed],
        {v: loop.outside[v] for v in rows if v in needed},
        outs,
        _evaluate_numbers,
    )
    numbers = []
    for e, x in zip(reads, found, strict=True):
        x = np.asarray(x).reshape(-1)
        size = e.invars[0].aval.shape[_row_axis(e)]
        numbers.append(np.clip(x, 0, size - 1) if e.primitive.name == "dynamic_slice" else x)
    return numbers


def _rows(stack: Any, numbers: np.ndarray, axis: int | None) -> Any:
    """Evenly spaced rows of a stack, `[T, ...]`; None for others, which stay numbered."""
    if len(numbers) < 2:
        return None
    stack = jnp.moveaxis(stack, axis, 0) if axis else stack
    first, last, steps = int(numbers[0]), int(numbers[-1]), np.unique(np.diff(numbers))
    if (
        len(steps) != 1
        or steps[0] == 0
        or not 0 <= min(first, last) <= max(first, last) < len(stack)
    ):
        return None
    step = int(steps[0])
    found = jax.lax.slice_in_dim(stack, min(first, last), max(first, last) + 1, abs(step))
    return found if step > 0 else jax.lax.rev(found, (0,))


# Rematerialized regions.


def _with_regions_read(closed: jex.ClosedJaxpr, kinds: dict[Var, Kind]) -> jex.ClosedJaxpr:
    """The same body, which reads before its regions what they read by a known number."""
    if not any(e.primitive.name in REMAT and _reads_inside(e) for e in closed.jaxpr.eqns):
        return closed

    def make(equation: Equation, values: list[Any]) -> Sequence[Any]:
        if equation.primitive.name in REMAT and not equation.effects:
            given = [kinds[a] if is_variable(a) else Kind.FIXED for a in equation.invars]
            return _region(equation, values, given)
        return bind(equation, values)

    return made_anew(closed, make)


def _region(equation: Equation, values: list[Any], kinds: Sequence[Kind]) -> list[Any]:
    """A region that is given the rows it would read by a number that is known outside."""
    closed = over_rows(jex.ClosedJaxpr(equation.params["jaxpr"], ()))
    jaxpr = closed.jaxpr
    inside = settled(jaxpr, kinds or [Kind.OPEN] * len(jaxpr.invars), range(0))
    constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    reads = _reads(jaxpr.eqns, set(jaxpr.invars), inside)
    env = {**constants, **dict(zip(jaxpr.invars, values, strict=True))}
    evaluate(_makers(jaxpr.eqns, [v for e in reads for v in e.outvars]), env)
    done = {v for e in reads for v in e.outvars}
    left = [e for e in jaxpr.eqns if done.isdisjoint(e.outvars)]
    rest = _makers(left, variables(jaxpr.outvars))
    needed = {v for e in rest for v in variables(e.invars)} | set(variables(jaxpr.outvars))
    given = [v for v in (*jaxpr.invars, *done) if v in needed]

    def region(*arrays: Any) -> list[Any]:
        own = {**constants, **dict(zip(given, arrays, strict=True))}
        evaluate(rest, own)
        return [as_array(read(own, v), v.aval) for v in jaxpr.outvars]

    return rematerialized(region, equation.params)(*(env[v] for v in given))
