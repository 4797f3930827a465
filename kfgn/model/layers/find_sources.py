"""Finds the values that are made of parameters entry by entry, before they meet data.

On its way to the data a parameter may be reshaped, cast, sliced, repeated, joined with
others or with constants, scaled, masked, or changed by a function of every entry.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.model.flatten.custom_vjp import holds_rule
from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.layers.sources import Move, Source, Sources
from kfgn.model.program.dependence import acts_by_entry, moved, moves_entries, scaling
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    bind_known,
    is_complex,
    is_variable,
    variables,
)
from kfgn.model.program.primitives import REGISTERED, row_of

# The value of an operand as far as it is known when the model is read, else None.
Known = Callable[[Any], np.ndarray | None]


def find_sources(model: FlatModel) -> Sources:
    """The values that are made of parameters entry by entry."""
    sources = {v: Source(v, {name: v}) for name, v in model.parameters.items()}
    _find(model.jaxpr, model, sources, _known_values(model))
    return sources


def _find(jaxpr: jex.Jaxpr, model: FlatModel, sources: Sources, known: Known) -> None:
    for equation in jaxpr.eqns:
        if (loop := model.loops.get(id(equation))) is not None:
            consts, states = loop.parts
            for k, (atom, v) in enumerate(zip(equation.invars, loop.body.invars, strict=True)):
                source = sources.get(atom) if is_variable(atom) else None
                if source is not None and k < consts:
                    sources[v] = source
                elif source is not None and k >= consts + states and _is_moved(source):
                    sources[v] = source.sliced(equation, atom, v)
            _find(loop.body, model, sources, known)
            continue
        operands = variables(equation.invars)
        own = [v for v in dict.fromkeys(operands) if v in sources]
        others = [v for v in operands if v not in own]
        if not own or any(model.roles[v] is not Role.CONSTANT for v in others):
            continue
        if any(model.roles[v] is not Role.PARAMETER or is_complex(v) for v in equation.outvars):
            continue  # it has no derivative, or none that is real
        if moves_entries(equation):
            found = [_moved(sources[own[0]], equation, k) for k in range(len(equation.outvars))]
        elif (factor := scaling(equation)) is not None:
            found = [_scaled(sources[own[0]], equation.outvars[0], factor)]
        else:
            slices = any(sources[v].loops for v in own)
            result = None if slices else _joined(equation, sources, known)
            result = result or _by_entry(equation, sources, known)
            found = [] if result is None else [result]
        if jaxpr is not model.jaxpr:  # slopes are known outside of loops, and labels of slices
            found = [x for x in found if not x.weighted and (_is_moved(x) or not x.loops)]
        sources.update({source.value: source for source in found})


def _is_moved(source: Source) -> bool:
    """Whether it is a parameter, moved and scaled by a number."""
    return source.joined is None and not source.weighted


def _moved(source: Source, equation: Equation, output: int) -> Source:
    out = equation.outvars[output]
    if equation.primitive.name in REGISTERED:
        moved(equation, np.zeros(equation.invars[0].aval.shape), output)  # checks it
    if source.joined is not None:
        labels = moved(equation, source.joined, output)
        return dataclasses.replace(source, value=out, joined=labels)
    return dataclasses.replace(source, value=out, steps=(*source.steps, Move(equation, output)))


def _scaled(source: Source, out: Var, factor: float) -> Source:
    factor = 1.0 if source.weighted else source.factor * factor
    return dataclasses.replace(source, value=out, factor=factor)


def _by_entry(equation: Equation, sources: Sources, known: Known) -> Source | None:
    """What an operation on every entry makes of a source, and of constants beside it."""
    row = row_of(equation)
    if not (row.elementwise or acts_by_entry(equation)) or holds_rule(equation):
        return None
    (out,) = equation.outvars
    own = [k for k, v in enumerate(equation.invars) if is_variable(v) and v in sources]
    source, *others = [_spread(sources[equation.invars[k]], out) for k in own]
    if not all(_alike(source, x) for x in others):
        return None
    if not others and len(row.signs) == 2:
        return _scaled(source, out, row.signs[own[0]])
    if not others and row.by_number and (row.multilinear or own[0] in row.linear_in):
        number = known(equation.invars[1 - own[0]])
        if number is not None and row.multilinear and not np.any(number):
            return None  # nothing is left of it
        if number is not None and row.multilinear and not np.all(number):
            labels = np.where(np.broadcast_to(number != 0, out.aval.shape), source.labels(), -1)
            source, number = dataclasses.replace(source, joined=labels), number[number != 0]
        if number is not None and number.size and np.all(number == number.flat[0]):
            return _scaled(source, out, row.by_number(number.flat[0]))
    return dataclasses.replace(source, value=out, factor=1.0, weighted=True)


def _spread(source: Source, out: Var) -> Source:
    """The source as an operand that is repeated along axes of one entry."""
    if source.value.aval.shape == out.aval.shape:
        return source
    return dataclasses.replace(source, joined=np.broadcast_to(source.labels(), out.aval.shape))


def _alike(a: Source, b: Source) -> bool:
    """Whether the same entries stand in the same places."""
    if a is b or a.loops or b.loops:  # labels are those of the first slice
        return a is b
    return a.names == b.names and np.array_equal(a.labels(), b.labels())


# Those that put entries of several operands into one value, by known numbers.
_JOINING = {"concatenate", "pad", "select_n", "gather", "scatter", "scatter-add"}
_JOINING |= {"dynamic_slice", "dynamic_update_slice"}


def _joined(equation: Equation, sources: Sources, known: Known) -> Source | None:
    """The entries of sources and constants in one value, found by joining their labels."""
    if equation.primitive.name not in _JOINING:
        return None
    starts: dict[str, int] = {}
    parameters: dict[str, Any] = {}
    own, values = [], []
    for atom in equation.invars:
        if is_variable(atom) and atom in sources:
            source = sources[atom]
            for name, v in source.parameters.items():
                starts.setdefault(name, sum(p.aval.size for p in parameters.values()))
                parameters[name] = v
            own.append(source)
            values.append(_relabeled(source, starts))
        elif jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            values.append(np.full(atom.aval.shape, -1, np.int32))
        elif (number := known(atom)) is not None:
            values.append(number)
        else:
            return None
    if equation.primitive.name == "scatter-add":  # something constant is added
        labels = values[0] if len(own) == 1 and np.all(values[2] < 0) else None
    elif equation.primitive.name == "concatenate":
        labels = np.concatenate(values, equation.params["dimension"])
    else:
        with jax.ensure_compile_time_eval():
            arrays = [jnp.asarray(x) for x in values]
            labels = np.asarray(equation.primitive.bind(*arrays, **equation.params))
    if labels is None:
        return None
    weighted = any(s.weighted for s in own) or len({s.factor for s in own}) > 1
    return Source(
        equation.outvars[0],
        parameters,
        joined=np.where(labels < 0, -1, labels),
        factor=1.0 if weighted else own[0].factor,
        weighted=weighted,
    )


def _relabeled(source: Source, starts: dict[str, int]) -> np.ndarray:
    """A source's labels where each of its parameters starts at the given number."""
    sizes = [v.aval.size for v in source.parameters.values()]
    new = [starts[n] + np.arange(k) for n, k in zip(source.parameters, sizes, strict=True)]
    labels = source.labels()
    return np.where(labels < 0, -1, np.concatenate(new)[labels]).astype(np.int32)


def _known_values(model: FlatModel) -> Known:
    """Constants by what is known of their values when the model is read."""
    makers = {v: e for e, _ in model.every_equation for v in e.outvars}
    constants, outside = dict(model.constants), dict[Var, Any]()
    for loop in model.loops.values():
        constants |= loop.constants
        first = loop.parts[0]
        outside |= zip(loop.body.invars[:first], loop.equation.invars[:first], strict=True)

    @functools.cache
    def value(v: Any) -> Any:
        if (atom := outside.get(v)) is not None:
            return value(atom) if is_variable(atom) else atom.val
        if v in constants:
            constant = constants[v]
            return None if isinstance(constant, jax.core.Tracer) else constant
        if v not in makers or model.roles[v] is not Role.CONSTANT:
            return None
        atoms: list[Any] = list(makers[v].invars)
        operands = [value(a) if is_variable(a) else a.val for a in atoms]
        if any(x is None for x in operands):
            return None
        with jax.ensure_compile_time_eval():
            return bind_known(makers[v], operands)[makers[v].outvars.index(v)]

    def known(atom: Any) -> np.ndarray | None:
        found = value(atom) if is_variable(atom) else atom.val
        return None if found is None else np.asarray(found)

    return known
