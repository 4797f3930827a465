"""Convolutions in the order of axes that XLA is fast at, also inside of loops.

For CPUs XLA puts the axes of a convolution in order, batch, space, channels, but not inside of
loops and branches. There one of transposed kernels, as every backward pass has them, takes five
times as long as outside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.base.types import Array, PyTree
from kfgn.model.flatten.loops import counts_of
from kfgn.model.program.equations import Equation, bind, is_variable, read

_OPTIONS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count"),
    *("batch_group_count", "precision", "preferred_element_type"),
)
_CALLS = ("jit", "pjit")


def run_in_order(jaxpr: jex.Jaxpr, constants: list[Any], arguments: list[Any]) -> list[Any]:
    """The outputs of a jaxpr, whose convolutions have their axes in order on CPUs.

    Also those in scans, as over the columns of KFLR; those in other loops stay as they are.
    """
    if not any_turned(jaxpr):
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, constants))(*arguments)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    env |= zip(jaxpr.invars, arguments, strict=True)
    for equation in jaxpr.eqns:
        values = [read(env, v) for v in equation.invars]
        if _is_turned(equation):
            found = [_in_order(equation, *values)]
        elif equation.primitive.name in _CALLS:
            body = equation.params["jaxpr"]
            found = run_in_order(body.jaxpr, body.consts, values)
        elif equation.primitive.name == "scan" and any_turned(equation.params["jaxpr"].jaxpr):
            found = _scanned(equation, values)
        else:
            found = bind(equation, values)
        env |= {v: x for v, x in zip(equation.outvars, found, strict=True) if is_variable(v)}
    return [read(env, v) for v in jaxpr.outvars]


def in_order(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same function of arrays, one array, likewise."""

    def run(*arguments: PyTree) -> Array:
        program = jax.make_jaxpr(function)(*arguments)
        return run_in_order(program.jaxpr, program.consts, jax.tree.leaves(arguments))[0]

    return run


def any_turned(jaxpr: jex.Jaxpr) -> bool:
    """Whether a convolution, also one in a scan, has its axes in another order."""
    return any(
        any_turned(e.params["jaxpr"].jaxpr)
        if e.primitive.name in (*_CALLS, "scan")
        else _is_turned(e)
        for e in jaxpr.eqns
    )


def _scanned(equation: Equation, values: list[Any]) -> list[Any]:
    body = equation.params["jaxpr"]
    constants, states = counts_of(equation, body.jaxpr)
    fixed, slices = values[:constants], values[constants + states :]

    def turn(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        found = run_in_order(body.jaxpr, body.consts, [*fixed, *carry, *xs])
        return found[:states], found[states:]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    start = values[constants : constants + states]
    carry, made = jax.lax.scan(turn, start, slices, **options)
    return [*carry, *made]


def _orders(equation: Equation) -> tuple[Any, Any]:
    """The axes of operands, kernel and outputs, and their order of choice."""
    found = equation.params["dimension_numbers"]
    rank = len(found.lhs_spec)
    space = tuple(range(rank - 2))
    data = (0, rank - 1, *(k + 1 for k in space))
    return found, type(found)(data, (rank - 1, rank - 2, *space), data)


def _is_turned(equation: Equation) -> bool:
    if equation.primitive.name != "conv_general_dilated":
        return False
    found, wanted = _orders(equation)
    return tuple(found) != tuple(wanted)


def _in_order(equation: Equation, operand: Array, kernel: Array) -> Array:
    found, wanted = _orders(equation)
    options = {n: equation.params[n] for n in _OPTIONS}

    def moved(x: Array, axes: tuple[int, ...], to: tuple[int, ...]) -> Array:
        return x if axes == to else jnp.moveaxis(x, axes, to)

    def turned(operand: Array, kernel: Array) -> Array:
        result = jax.lax.conv_general_dilated(
            moved(operand, found.lhs_spec, wanted.lhs_spec),
            moved(kernel, found.rhs_spec, wanted.rhs_spec),
            dimension_numbers=wanted,
            **options,
        )
        return moved(result, wanted.out_spec, found.out_spec)

    def as_it_is(operand: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(operand, kernel, dimension_numbers=found, **options)

    return jax.lax.platform_dependent(operand, kernel, cpu=turned, default=as_it_is)
