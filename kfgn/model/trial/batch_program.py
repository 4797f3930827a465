"""A model compiled, quickly and without its effects, to be run on made-up values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.base.trees import path_name
from kfgn.base.types import PyTree
from kfgn.model.flatten.inline import flattened
from kfgn.model.program.equations import abstract, as_function, live_equations
from kfgn.model.trial.bounded import bounded, has_while

# The program runs a few times, on three examples: it is not worth optimizing. (On CPU.)
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Program(NamedTuple):
    """A model compiled for one size of the batch."""

    run: Callable[..., Any]  # of `(*known, *params, *inputs)`
    known: list[Any]  # what it closes over, which may be traced around this call
    names: list[str]  # of its outputs
    jaxpr: jex.Jaxpr


class Traced(NamedTuple):
    """A model traced on one size of the batch."""

    closed: jex.ClosedJaxpr
    out: PyTree  # shapes
    args: PyTree  # params and batch, likewise
    size: int  # of the batch


def trace_model(model: Callable, params: PyTree, example: PyTree, count: int) -> Traced:
    """The model on a batch of `count` examples, each shaped as `example`."""
    batch = jax.tree.map(lambda a: abstract(a, (count, *a.shape)), example)
    closed, out = jax.make_jaxpr(model, return_shape=True)(params, batch)
    return Traced(closed, out, (params, batch), count)


def compile_model(traced: Traced) -> Program:
    """The program of a model, of outputs that have the examples along their first axes."""
    closed = traced.closed
    if closed.effects:
        closed = _without_effects(closed)
    if has_while(closed.jaxpr):
        closed = bounded(closed)
    jaxpr, outs = closed.jaxpr, jax.tree_util.tree_flatten_with_path(traced.out)[0]
    kept = [k for k, (_, shape) in enumerate(outs) if _is_comparable(shape, traced.size)]
    function = as_function(
        jaxpr.eqns, [*jaxpr.constvars, *jaxpr.invars], [jaxpr.outvars[k] for k in kept]
    )
    known = [abstract(x, x.shape) if _is_tracer(x) else x for x in closed.consts]
    lowered = jax.jit(function).lower(*known, *jax.tree.leaves(traced.args))
    names = [path_name(outs[k][0]) for k in kept]
    return Program(_quickly(lowered), known, names, jaxpr)


def _without_effects(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The same outputs: made-up values are nothing that a user wants printed."""

    flat = flattened(closed)
    return jex.ClosedJaxpr(flat.jaxpr.replace(eqns=live_equations(flat.jaxpr)), flat.consts)


def _quickly(lowered: Any) -> Callable[..., Any]:
    """The compiled program; which options there are differs between versions of XLA."""
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(_QUICK)
        except jax.errors.JaxRuntimeError:
            pass
    return lowered.compile()


def _is_comparable(shape: Any, count: int) -> bool:
    is_number = not jnp.issubdtype(shape.dtype, jax.dtypes.extended)
    return is_number and shape.shape[:1] == (count,)


def _is_tracer(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)
