"""Evaluation without axes of one entry, of which every value has that of the one example.

Sums over an axis, as the derivatives of broadcasts are, take XLA on CPU up to twenty
times as long where an axis of one entry stands beside it, and the derivative of a product in
its kernel sums over that axis too, for which XLA transposes a copy of the whole batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kfgn.model.program.equations import Equation, Var, bind, read
from kfgn.model.program.primitives import is_differentiable, row_of


def evaluate_thin(equation: Equation, env: dict[Var, Any]) -> None:
    """Evaluates an equation; results of broadcasts, products, entrywise ones are left thin."""
    values = [read(env, v) for v in equation.invars]
    if equation.primitive.name == "broadcast_in_dim" and len(values) == 1:
        results = [_broadcast(equation, values[0])]
    elif row_of(equation).elementwise and is_differentiable(equation):
        long = [k for k, n in enumerate(equation.outvars[0].aval.shape) if n != 1]
        results = bind(
            equation, [_along(v, x, long) for v, x in zip(equation.invars, values, strict=True)]
        )
    elif equation.primitive.name == "dot_general":
        results = _product(equation, values)
    else:
        results = bind(equation, list(map(whole, values, equation.invars)))
    env.update(zip(equation.outvars, results, strict=True))


def _along(atom: Any, value: Any, axes: list[int]) -> Any:
    """The value with these axes of its variable only; a number has none."""
    shape = [atom.aval.shape[axis] for axis in axes] if atom.aval.shape else []
    return value if list(jnp.shape(value)) == shape else jnp.reshape(value, shape)


def whole(value: Any, atom: Any) -> Any:
    """A value in the shape of its variable."""
    return value if jnp.shape(value) == atom.aval.shape else jnp.reshape(value, atom.aval.shape)


def _broadcast(equation: Equation, value: Any) -> Any:
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    own = equation.invars[0].aval.shape
    long = [axis for axis, n in enumerate(shape) if n != 1]
    places = [long.index(axis) for axis, n in zip(axes, own, strict=True) if n != 1]
    value = jnp.asarray(value, equation.outvars[0].aval.dtype)
    value = value.reshape([n for n in own if n != 1])
    return jax.lax.broadcast_in_dim(value, [shape[axis] for axis in long], places)


def _product(equation: Equation, values: list[Any]) -> list[Any]:
    """A product without the axis of examples, where that stays and something stands beside it."""
    numbers = equation.params["dimension_numbers"]
    bound = [{*c, *b} for c, b in zip(*numbers, strict=True)]
    shapes = [v.aval.shape for v in equation.invars]
    free = [
        [n for k, n in enumerate(s) if k not in own] for s, own in zip(shapes, bound, strict=True)
    ]
    drops = [
        shape[:1] == (1,) and 0 not in own and other != []
        for shape, own, other in zip(shapes, bound, reversed(free), strict=True)
    ]
    kept = [list(range(int(drop), len(shape))) for drop, shape in zip(drops, shapes, strict=True)]
    numbers = tuple(
        tuple(tuple(a - drop for a in axes) for axes, drop in zip(pair, drops, strict=True))
        for pair in numbers
    )
    thin = equation.replace(params={**equation.params, "dimension_numbers": numbers})
    pairs = zip(equation.invars, values, kept, strict=True)
    return bind(thin, [_along(v, x, axes) for v, x, axes in pairs])
