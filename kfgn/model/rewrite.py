"""Products put into the order in which layers are easiest to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex

from kfgn.model.equations import Equation, Var, bind, read, variables


def reassociate(closed: jex.ClosedJaxpr, values: Sequence[Any], parameters: int) -> list[Any]:
    """Evaluates a flat jaxpr with `y * (x * s)` as `(y * x) * s`, for data y and a parameter s.

    Normalizations multiply their scale with the reciprocal deviation x first,
    data or constant; with the scale last, it is seen to be a scale, and a
    shift that follows to belong to it.

    Args:
      closed: the jaxpr.
      values: its operands.
      parameters: how many of them, the first ones, are parameters.
    """
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    split = (set(jaxpr.invars[:parameters]), set(jaxpr.invars[parameters:]))
    inner = _inner_products(jaxpr, *split)
    waiting: dict[Var, tuple[Any, Any]] = {}
    for equation in jaxpr.eqns:
        out = equation.outvars[0]
        if out in inner:
            waiting[out] = inner[out]
        elif any(v in waiting for v in variables(equation.invars)):
            (product,) = [v for v in equation.invars if v in waiting]
            (other,) = [v for v in equation.invars if v is not product]
            x, s = waiting[product]
            data = jax.lax.mul(*_of_one_rank(read(env, other), read(env, x)))
            env[out] = jax.lax.mul(*_of_one_rank(data, read(env, s)))
        else:
            whole = [read(env, v) for v in equation.invars]
            env.update(zip(equation.outvars, bind(equation, whole), strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def _of_one_rank(*operands: Any) -> tuple[Any, ...]:
    shape = jax.numpy.broadcast_shapes(*(jax.numpy.shape(x) for x in operands))
    return tuple(jax.numpy.broadcast_to(x, shape) for x in operands)


def _inner_products(
    jaxpr: jex.Jaxpr, parameters: set[Var], data: set[Var]
) -> dict[Var, tuple[Any, Any]]:
    """Products of a parameter with something else that are read once, by a product with data."""
    on_data, on_parameters = _depends(jaxpr, data), _depends(jaxpr, parameters)
    readers: dict[Var, list[Equation | None]] = {}
    for equation in jaxpr.eqns:
        for v in variables(equation.invars):
            readers.setdefault(v, []).append(equation)
    for v in variables(jaxpr.outvars):
        readers.setdefault(v, []).append(None)
    found: dict[Var, tuple[Any, Any]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name != "mul" or len(variables(equation.invars)) != 2:
            continue
        pure = [v in on_parameters and v not in on_data for v in equation.invars]
        outs = readers.get(equation.outvars[0], [])
        if sum(pure) != 1 or len(outs) != 1 or outs[0] is None:
            continue
        x, s = equation.invars[pure.index(False)], equation.invars[pure.index(True)]
        outer = outs[0]
        if outer.primitive.name != "mul" or any(v in found for v in variables(outer.invars)):
            continue
        if x in on_parameters and x not in on_data:
            continue
        if all(v in on_data for v in outer.invars if v is not equation.outvars[0]):
            found[equation.outvars[0]] = (x, s)
    return found


def _depends(jaxpr: jex.Jaxpr, data: set[Var]) -> set[Var]:
    depends = set(data)
    for equation in jaxpr.eqns:
        if depends.intersection(variables(equation.invars)):
            depends.update(equation.outvars)
    return depends
