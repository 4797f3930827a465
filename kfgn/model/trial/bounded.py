"""Loops that end: a model's `while` loops with a bound on their iterations.

A model that iterates to a tolerance may never reach it where its parameters are made up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.model.flatten.inline import Value, inline
from kfgn.model.program.equations import Equation, Role, as_array, bind, bodies
from kfgn.model.program.primitives import row_of

# Iterations of a loop, and of one inside of it.
_MOST = (300, 30, 3)


def has_while(jaxpr: jex.Jaxpr) -> bool:
    """Whether a jaxpr has a `while` loop somewhere inside."""
    return any(e.primitive.name == "while" or any(map(has_while, bodies(e))) for e in jaxpr.eqns)


def bounded(closed: Any, depth: int = 0) -> jex.ClosedJaxpr:
    """The same jaxpr, whose `while` loops end after some iterations; derivative rules are lost."""

    def bind_bounded(equation: Equation, arrays: Sequence[Any]) -> Sequence[Any]:
        if equation.primitive.name == "while":
            return _while(equation, arrays, depth)
        if not any(map(has_while, bodies(equation))):
            return bind(equation, arrays)
        body = equation.params.get(row_of(equation).body)
        if body is not None:  # a function with a derivative rule
            return jex.jaxpr_as_fun(bounded(body, depth))(*arrays)
        params = {k: _bounded_in(v, depth) for k, v in equation.params.items()}
        return bind(equation.replace(params=params), arrays)

    def run(*args: Any) -> list[Any]:
        found = inline(closed, [Value(x, Role.CONSTANT) for x in args], bind_bounded)
        return [as_array(x.array, v.aval) for x, v in zip(found, closed.jaxpr.outvars, strict=True)]

    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    return jax.make_jaxpr(run)(*avals)


def _bounded_in(value: Any, depth: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_bounded_in(x, depth) for x in value)
    return bounded(value, depth) if isinstance(value, jex.ClosedJaxpr) else value


def _while(equation: Equation, arrays: Sequence[Any], depth: int) -> list[Any]:
    options, most = equation.params, _MOST[min(depth, len(_MOST) - 1)]
    first, second = options["cond_nconsts"], options["body_nconsts"]
    of_cond, of_body = arrays[:first], arrays[first : first + second]
    start = [
        as_array(x, v.aval) for x, v in zip(arrays[first + second :], equation.outvars, strict=True)
    ]
    proceeds = jex.jaxpr_as_fun(bounded(options["cond_jaxpr"], depth + 1))
    step = jex.jaxpr_as_fun(bounded(options["body_jaxpr"], depth + 1))

    def goes_on(state: tuple[Any, list[Any]]) -> Any:
        return (state[0] < most) & proceeds(*of_cond, *state[1])[0]

    def advanced(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        return state[0] + 1, list(step(*of_body, *state[1]))

    return jax.lax.while_loop(goes_on, advanced, (jnp.zeros((), jnp.int32), start))[1]
