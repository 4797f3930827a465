"""Products in another order, in which parameters that are multiplied first meet data first.

`x @ (W + A @ B)` is `x @ W + (x @ A) @ B`, where every parameter has a layer of
its own; and a scale that data is multiplied with last is seen to be one.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    is_variable,
    live_equations,
    readers_of,
    variables,
)


def reassociated(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role]) -> jex.Jaxpr:
    """The same function in such an order."""
    jaxpr = jaxpr.replace(eqns=_scales_last(jaxpr, roles))
    jaxpr = jaxpr.replace(eqns=_data_first(jaxpr, roles))
    return jaxpr.replace(eqns=live_equations(jaxpr, with_effects=True))


def _scales_last(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role]) -> list[Equation]:
    """The equations with `y * (x * s)` as `(y * x) * s`, for data y and a parameter s.

    Normalizations multiply their scale with the reciprocal deviation x first,
    data or constant; with the scale last, it is seen to be a scale, and a
    shift that follows to belong to it. Products that others read, too, stay.
    """
    readers, equations = readers_of(jaxpr), []
    waiting: dict[Var, tuple[Var, Var]] = {}
    for equation in jaxpr.eqns:
        operands = variables(equation.invars)
        if any(v in waiting for v in operands):
            (product,), (y,) = (
                [v for v in operands if (v in waiting) == inner] for inner in (True, False)
            )
            x, s = waiting[product]
            equations += _regrouped(y, x, s, equation.outvars[0])
        elif (pair := _inner_product(equation, readers, roles, waiting)) is not None:
            waiting[equation.outvars[0]] = pair
        else:
            equations.append(equation)
    return equations


def _regrouped(y: Var, x: Var, s: Var, out: Var) -> list[Equation]:
    """Equations for `out = (y * x) * s`."""

    def product(*operands: Any) -> Any:
        shape = jnp.broadcast_shapes(*map(jnp.shape, operands))
        return jax.lax.mul(*(jnp.broadcast_to(operand, shape) for operand in operands))

    return _traced(lambda y, x, s: product(product(y, x), s), [y, x, s], out)


def _inner_product(
    equation: Equation,
    readers: dict[Var, list[Equation | None]],
    roles: Mapping[Var, Role],
    waiting: dict[Var, Any],
) -> tuple[Var, Var] | None:
    """`(x, s)` of a product `x * s` that a product with data alone reads."""
    operands = variables(equation.invars)
    pure = [roles[v] is Role.PARAMETER for v in operands]
    if equation.primitive.name != "mul" or len(operands) != 2 or sum(pure) != 1:
        return None
    (out,) = equation.outvars
    (outer, *others) = readers.get(out, [None])
    if others or outer is None or outer.primitive.name != "mul":
        return None
    rest = [atom for atom in outer.invars if atom is not out]
    if len(variables(rest)) != 1 or roles[rest[0]] < Role.PASSIVE or rest[0] in waiting:
        return None
    return operands[pure.index(False)], operands[pure.index(True)]


def _traced(function: Callable, inputs: Sequence[Any], out: Var) -> list[Equation]:
    """The equations of a function of some variables, with their names."""
    traced = jax.make_jaxpr(function)(*(_shape(v) for v in inputs)).jaxpr
    names = dict(zip([*traced.invars, *traced.outvars], [*inputs, out], strict=True))
    return [
        e.replace(
            invars=[v if isinstance(v, jex.Literal) else names.get(v, v) for v in e.invars],
            outvars=[names.get(v, v) for v in e.outvars],
        )
        for e in traced.eqns
    ]


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


class _Term(NamedTuple):
    """A number times a product of arrays, summed over the indices that two of them share."""

    number: float
    scalars: tuple[Var, ...]
    factors: tuple[tuple[Var, str], ...]  # each with a letter for every axis


def _data_first(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role]) -> list[Equation]:
    """The equations with every kernel that is a sum of products of parameters multiplied out."""
    makers = {v: e for e in jaxpr.eqns for v in e.outvars}
    equations: list[Equation] = []
    for equation in jaxpr.eqns:
        new = None
        if equation.primitive.name == "dot_general":
            new = _multiplied_out(equation, makers, roles)
        equations += [equation] if new is None else new
    return equations


def _multiplied_out(
    equation: Equation, makers: Mapping[Var, Equation], roles: Mapping[Var, Role]
) -> list[Equation] | None:
    kernels = [v for v in variables(equation.invars) if roles[v] is Role.PARAMETER]
    (contracted, batch), (out,) = equation.params["dimension_numbers"], equation.outvars
    if len(kernels) != 1 or roles.get(out) is not Role.ACTIVE or any(batch):
        return None
    side = equation.invars.index(kernels[0])
    fresh = map(chr, itertools.count(ord("a")))
    axes = ["".join(next(fresh) for _ in v.aval.shape) for v in equation.invars]
    for a, b in zip(contracted[side], contracted[1 - side], strict=True):
        axes[side] = axes[side].replace(axes[side][a], axes[1 - side][b])
    terms = _terms(kernels[0], axes[side], makers, roles, fresh)
    if all(len(term.factors) == 1 for term in terms):
        return None
    data, kept = equation.invars[1 - side], set(axes[0]) ^ set(axes[1])
    wanted = "".join(c for c in axes[0] + axes[1] if c in kept)
    options = {k: equation.params[k] for k in ("precision", "preferred_element_type")}
    inputs = list(dict.fromkeys([data, *(v for t in terms for v in
                                         (*t.scalars, *(f for f, _ in t.factors)))]))  # fmt: skip

    def product(*values: Any) -> Any:
        env = dict(zip(inputs, values, strict=True))
        parts = [_product(env, data, axes[1 - side], term, wanted, options) for term in terms]
        return sum(parts[1:], start=parts[0]).astype(out.aval.dtype)

    return _traced(product, inputs, out)


def _product(
    env: dict[Var, Any], data: Var, axes: str, term: _Term, wanted: str, options: dict[str, Any]
) -> Any:
    """The data times one factor after the other."""
    value, left = env[data], list(term.factors)
    while left:
        factor, own = next(f for f in left if set(f[1]) & set(axes))
        left.remove((factor, own))
        shared = [c for c in axes if c in own]
        pairs = [axes.index(c) for c in shared], [own.index(c) for c in shared]
        value = jax.lax.dot_general(value, env[factor], (pairs, ((), ())), **options)
        axes = "".join(c for c in axes + own if c not in shared)
    for scalar in term.scalars:
        value = value * jnp.broadcast_to(env[scalar], value.shape)
    value = value if term.number == 1 else value * term.number
    order = [axes.index(c) for c in wanted]
    return value if order == sorted(order) else jnp.transpose(value, order)


def _terms(
    v: Var, axes: str, makers: Mapping[Var, Equation], roles: Mapping[Var, Role], fresh: Any
) -> list[_Term]:
    """A kernel as a sum of products, as far as its equations say."""
    whole = [_Term(1.0, (), ((v, axes),))]
    maker = makers.get(v)
    if maker is None or roles[v] is not Role.PARAMETER:
        return whole

    def of(atom: Any, own: str) -> list[_Term]:
        return _terms(atom, own, makers, roles, fresh)

    name, atoms = maker.primitive.name, maker.invars
    full = [a for a in atoms if is_variable(a) and a.aval.shape == v.aval.shape]
    if name == "transpose":
        order = maker.params["permutation"]
        return of(atoms[0], "".join(axes[order.index(k)] for k in range(len(order))))
    if name == "neg":
        return [t._replace(number=-t.number) for t in of(atoms[0], axes)]
    if name in ("add", "add_any", "sub") and len(full) == 2:
        first, second = (of(atom, axes) for atom in atoms)
        sign = -1 if name == "sub" else 1
        return first + [t._replace(number=sign * t.number) for t in second]
    if len(full) == 1 and (name == "mul" or (name == "div" and full[0] is atoms[0])):
        other = atoms[1 - atoms.index(full[0])]
        if is_variable(other) and (name == "div" or math.prod(other.aval.shape) != 1):
            return whole
        if is_variable(other):
            return [t._replace(scalars=(*t.scalars, other)) for t in of(full[0], axes)]
        number = float(other.val) if name == "mul" else 1 / float(other.val)
        return [t._replace(number=number * t.number) for t in of(full[0], axes)]
    if name == "dot_general" and not any(maker.params["dimension_numbers"][1]):
        contracted, _ = maker.params["dimension_numbers"]
        own = [[""] * len(a.aval.shape) for a in atoms]
        for a, b in zip(*contracted, strict=True):
            own[0][a] = own[1][b] = next(fresh)
        rest = iter(axes)
        names = ["".join(c or next(rest) for c in side) for side in own]
        left, right = (of(a, n) for a, n in zip(atoms, names, strict=True))
        return [
            _Term(t.number * u.number, t.scalars + u.scalars, t.factors + u.factors)
            for t in left
            for u in right
        ]
    return whole
