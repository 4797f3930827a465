"""How a model is read: flattened, its layers found, and kept for as long as its objective lives."""

import dataclasses
import functools
from typing import Any

import jax

from kfgn.base.devices import refuse_named_vmap
from kfgn.base.errors import LoopError, OptionError
from kfgn.base.linalg import count_of
from kfgn.base.types import PyTree
from kfgn.model.flatten.auxiliary import batch_axes
from kfgn.model.flatten.flat_model import call_model, flatten_model, with_roles
from kfgn.model.flatten.loops import innermost
from kfgn.model.graph.differentiability import check_derivatives
from kfgn.model.graph.graph import Graph
from kfgn.model.graph.remembered import is_traced, remembered
from kfgn.model.layers.find_layers import LOOPED, find_layers
from kfgn.model.layers.find_sources import find_sources
from kfgn.model.layers.find_uses import constant_states
from kfgn.model.program.dependence import moves_entries
from kfgn.model.program.equations import (
    Role,
)
from kfgn.model.trial.statistics import check_examples, per_example_axes
from kfgn.objective.objective import Objective

_TOO_LONG = (
    "; the loop is too long to unroll, and kernels inside of it are parameters, functions of their "
    "entries that are made before the loop, or the slices that jax.lax.scan takes of a parameter"
)


def build_graph(
    objective: Objective,
    params: PyTree,
    inputs: PyTree,
    exact: bool = False,
    apart: frozenset[str] = frozenset(),
    barred: frozenset[str] = frozenset(),
    unroll: bool = False,
) -> Graph:
    """Traces the objective's model on one example of `inputs` (arrays or shapes).

    What was read is kept, for as long as the objective lives, and given again
    where `params` or `inputs` are being traced, or shapes only. Called with
    values, it always reads anew: a model may depend on what changes in Python,
    which a trace would not see either.

    With `exact`, parameters in no layer, and those of tied layers and of layers
    whose kernels are functions of them, are *free*: the walk differentiates them
    like data, so that it ends with their own exact blocks, whatever becomes of
    them in the model. For `apart` and `barred` see `find_layers`.

    With `unroll`, loops over parameters are unrolled, for methods that walk through
    every value; else each is one equation, and its uses of a kernel are one use. Where
    more parameters have a block then, and it is not too long, it is unrolled all the same.
    """
    if not isinstance(objective, Objective):
        raise OptionError(
            f"objective must be a kfgn.Objective, found a {type(objective).__name__}; make one "
            "with kfgn.Objective(model, loss); of a sum of objectives ask its terms one by one."
        )
    kept: dict[Any, Graph]
    kept, signature = remembered(objective, params, inputs, (exact, apart, barred, unroll))
    if signature in kept and is_traced(params, inputs):
        return kept[signature]
    read = functools.partial(_read, objective, params, inputs, exact, apart, barred)
    if unroll:
        # There may be nothing to unroll.
        given = build_graph(objective, params, inputs, False, apart, barred) if not exact else None
        graph = read(True) if given is None or given.model.loops else given
    else:
        graph = read(False)
        if graph.model.loops and (graph.reasons or _may_split(graph)):
            try:
                graph = min(graph, read(True), key=lambda g: (len(g.reasons), len(g.layers)))
            except LoopError:
                told = {n: r + _TOO_LONG * (LOOPED in r) for n, r in graph.reasons.items()}
                graph = dataclasses.replace(graph, reasons=told)
    kept.pop(signature, None)
    bodies = [loop.constants for loop in graph.model.loops.values()]
    known = [x for values in (graph.model.constants, *bodies) for x in values.values()]
    if not any(isinstance(x, jax.core.Tracer) for x in known):
        kept[signature] = graph
    return graph


def _may_split(graph: Graph) -> bool:
    """Whether a bias is added on the other side of a region's border than its product is."""
    regions = [loop for loop in graph.model.loops.values() if loop.once]
    border = {v for loop in regions for v in (*loop.body.invars, *loop.equation.outvars)}
    for equation, _ in graph.model.every_equation if border else ():
        if moves_entries(equation) and equation.invars[0] in border:
            border.update(equation.outvars)
    return any(u.form.additive and innermost(u.input) in border for u in graph.uses.values())


def _read(
    objective: Objective,
    params: PyTree,
    inputs: PyTree,
    exact: bool,
    apart: frozenset[str],
    barred: frozenset[str],
    unroll: bool,
) -> Graph:
    axis, axes = None, None
    if objective.axis_name is not None:
        refuse_named_vmap((params, inputs), objective.axis_name)
        axis = objective.axis_name, count_of(inputs)
    if objective.has_aux:
        axes = batch_axes(functools.partial(call_model, objective.run), axis, params, inputs)
    run = objective.run if objective.has_aux else objective.model
    model = flatten_model(run, params, inputs, axis, axes, unroll)
    if model.aux:
        known = per_example_axes(objective, params, inputs, model.aux.axes)
        model = dataclasses.replace(model, aux=model.aux._replace(axes=known))
    elif exact or not unroll:  # else it was read before, with its loops
        check_examples(objective, params, inputs)
    sources = find_sources(model)
    states = constant_states(model, sources)
    if states:
        model = with_roles(model, passive=states)
        sources = {v: s for v, s in sources.items() if model.roles[v] is Role.PARAMETER}
    layers, reasons = find_layers(model, sources, apart, barred)
    free: tuple[str, ...] = ()
    if exact:
        tied = {
            n: x for n, x in layers.items() if x.derived or any(len(slot) > 1 for slot in x.slots)
        }
        free = (*reasons, *(name for layer in tied.values() for name in layer.parameters))
        model = with_roles(model, passive=states, active=[model.parameters[n] for n in free])
    check_derivatives(model)
    return Graph(model, layers, reasons, free)
