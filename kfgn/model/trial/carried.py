"""Constants with a row per example: noise, masks and positions that a model makes for its batch.

In `x @ w + jax.random.normal(key, (len(x), d))` with one key, the model on a batch is not the
model on each of its examples, for it draws other noise there. But what it draws is constant:
with row n of it as data of example n, the examples are independent. So the batch's constants
are computed once, as the user's function does, and carried along with its inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from kfgn.base.devices import vary, vary_shapes, varying_axes
from kfgn.base.errors import ModelError
from kfgn.base.linalg import count_of
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, PyTree
from kfgn.model.flatten.flat_model import check_parameters
from kfgn.model.flatten.inline import Value, inline
from kfgn.model.flatten.numbered import over_rows
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    abstract,
    as_function,
    evaluate,
    live_equations,
    variables,
)
from kfgn.model.trial.ahead import made_ahead
from kfgn.model.trial.batch_noise import draws_for_batch
from kfgn.model.trial.bounded import bounded
from kfgn.model.trial.independence import has_passed
from kfgn.model.trial.made_up import DRAWS, MANY, Draw, Shape, made_up, on_made_up_values
from kfgn.model.trial.moved import change_of
from kfgn.model.trial.separate import acts_alone
from kfgn.model.trial.statistics import check_examples
from kfgn.objective.objective import Objective
from kfgn.objective.sum_of import require_objective


class _Traced(NamedTuple):
    """A model on a batch, in two parts."""

    known: list[Any]  # what it closes over
    constants: Callable[[list[Any]], list[Array]]  # of `known`: what depends on nothing else
    rest: jex.ClosedJaxpr  # of `(*constants, *params, *inputs)`: the leaves of its results
    shapes: list[Any]  # of the constants
    tree: Any  # of its results

    def run(self, *args: Any) -> list[Array]:
        """The leaves of the model's results."""
        pairs = zip(args, self.rest.jaxpr.invars, strict=True)
        cast = [vary(x, varying_axes(v.aval)) for x, v in pairs]
        return jex.jaxpr_as_fun(self.rest)(*cast)


@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
    """The model of `(params, (inputs, rows))`, with row n of its constants beside example n."""

    model: Callable[[PyTree, PyTree], PyTree]
    axes: tuple[int | None, ...]  # of each constant, along which it has a row per example
    shared: list[Array]  # the constants that have none
    independent: ClassVar[bool] = True  # proven, or tried

    def __call__(self, params: PyTree, inputs: tuple[PyTree, list[Array]]) -> PyTree:
        data, rows = inputs
        traced = _trace(self.model, params, data)
        given, shared = iter(rows), iter(self.shared)
        constants = [
            next(shared) if axis is None else jnp.moveaxis(next(given), 0, axis)
            for axis in self.axes
        ]
        return jax.tree.unflatten(
            traced.tree, traced.run(*constants, *jax.tree.leaves((params, data)))
        )


def carry(objective: Objective, params: PyTree, inputs: PyTree) -> tuple[Objective, PyTree]:
    """The objective and inputs that carry the batch's own constants, where the model has such.

    Raises:
      ModelError: the model on a batch is not the model on each of its examples, with or
        without what it could carry.
    """
    require_objective(objective)
    check_parameters(named_leaves(params))
    found = _carried(objective, params, inputs) if _draws(objective, params, inputs) else None
    if found is None:
        try:
            check_examples(objective, params, inputs)
            return objective, inputs
        except ModelError as error:
            found = _carried(objective, params, inputs)
            if found is None:
                raise error
    model, rows = found
    return dataclasses.replace(objective, model=model), (inputs, rows)


def _draws(objective: Objective, params: PyTree, inputs: PyTree) -> bool:
    """Whether a model that was not seen yet draws noise that is no example's own."""
    if getattr(objective.model, "independent", False) or has_passed(objective.model):
        return False
    try:
        shapes = vary_shapes(
            _shapes((params, _shapes(inputs, 1)), None), varying_axes((params, inputs))
        )
        jaxpr = jax.make_jaxpr(objective.model)(*shapes).jaxpr
    except Exception:  # the trace of one example tells what is wrong
        return False
    return draws_for_batch(jaxpr, jaxpr.invars)


def _carried(
    objective: Objective, params: PyTree, inputs: PyTree
) -> tuple[Carried, list[Array]] | None:
    """The model that carries its constants, and their rows; None where that is another model."""
    if objective.axis_name is not None:  # under which every example has the same noise
        return None
    try:
        one, few, whole = (
            _trace(objective.model, params, _shapes(inputs, n)) for n in (1, MANY, count_of(inputs))
        )
        axes = _row_axes(one.shapes, few.shapes, whole.shapes, count_of(inputs))
        if not any(axis is not None for axis in axes):
            return None
        tree = jax.tree.unflatten(few.tree, range(few.tree.num_leaves))
        outputs = len(jax.tree.leaves(tree[0] if objective.has_aux else tree))
        places = [*axes, *(None for _ in jax.tree.leaves(params)),
                  *(0 for _ in jax.tree.leaves(inputs))]  # fmt: skip
        counts = [1, MANY, count_of(inputs)]
        same = acts_alone([t.rest for t in (one, few, whole)], counts, places, outputs)
        if not same:
            with on_made_up_values():
                shapes = _shapes(params, None), _shapes(inputs, MANY)
                same = all(_is_same(one, few, axes, outputs, shapes, draw) for draw in DRAWS[:2])
    except Exception:  # what fails on another size of the batch is not carried
        return None
    if not same:
        return None
    pairs = list(zip(whole.constants(whole.known), axes, strict=True))
    rows = [jnp.moveaxis(x, axis, 0) for x, axis in pairs if axis is not None]
    return Carried(objective.model, axes, [x for x, axis in pairs if axis is None]), rows


def _shapes(tree: PyTree, count: int | None) -> PyTree:
    """Those of a batch of `count` examples; of the tree itself without."""
    return jax.tree.map(
        lambda a: abstract(a, a.shape if count is None else (count, *a.shape[1:])), tree
    )


def _trace(model: Callable, params: PyTree, inputs: PyTree) -> _Traced:
    """Traces a model on a batch, calls inlined, and takes its constants apart."""
    axes = varying_axes((params, inputs))
    shapes = vary_shapes(_shapes((params, inputs), None), axes)
    closed, out = jax.make_jaxpr(model, return_shape=True)(*shapes)
    own = closed.jaxpr.constvars

    def inlined(*args: Any) -> list[Any]:
        body = as_function(closed.jaxpr.eqns, [*own, *closed.jaxpr.invars], closed.jaxpr.outvars)
        whole = jax.make_jaxpr(body)(*args)
        first = len(closed.consts)
        roles = [Role.CONSTANT if k < first else Role.ACTIVE for k in range(len(args))]
        return [v.array for v in inline(whole, list(map(Value, args, roles)), unroll=False)]

    known = [abstract(x, np.shape(x)) for x in closed.consts]
    flat = jax.make_jaxpr(inlined)(*known, *jax.tree.leaves(shapes))
    flat = over_rows(flat)  # while the numbers of rows are known
    flat = made_ahead(flat, [k < len(known) for k in range(len(flat.jaxpr.invars))])
    first, given = flat.jaxpr.invars[: len(known)], flat.jaxpr.invars[len(known) :]
    constant: set[Var] = {*flat.jaxpr.constvars, *first}
    before: list[Equation] = []
    after: list[Equation] = []
    for equation in flat.jaxpr.eqns:
        alone = constant.issuperset(variables(equation.invars)) and not equation.effects
        (before if alone else after).append(equation)
        if alone:
            constant.update(equation.outvars)
    read = [v for e in after for v in variables(e.invars)] + variables(flat.jaxpr.outvars)
    border = list(dict.fromkeys(v for v in read if v in constant))

    def constants(values: list[Any]) -> list[Array]:
        env = dict(zip([*flat.jaxpr.constvars, *first], [*flat.consts, *values], strict=True))
        evaluate(before, env)
        return [env[v] for v in border]

    return _Traced(
        closed.consts,
        constants,
        jex.ClosedJaxpr(flat.jaxpr.replace(constvars=[], invars=[*border, *given], eqns=after), ()),
        [abstract(v.aval, v.aval.shape) for v in border],
        jax.tree.structure(out),
    )


def _row_axes(one: list[Shape], few: list[Shape], whole: list[Shape], count: int) -> Any:
    """Along which axis each constant has as many rows as the batch has examples.

    Raises:
      ValueError: the batch's size enters a shape in another way, or the constants are others.
    """
    axes = []
    for a, b, c in zip(one, few, whole, strict=True):
        moved = [k for k, pair in enumerate(zip(a.shape, b.shape, strict=True)) if len({*pair}) > 1]
        axis = moved[0] if moved else None
        expected = list(a.shape)
        if axis is not None:
            expected[axis] = count
        if len(moved) > 1 or (moved and b.shape[moved[0]] != MANY) or c.shape != tuple(expected):
            raise ValueError(f"shapes {a}, {b}, {c}")
        axes.append(axis)
    return tuple(axes)


def _is_same(
    one: _Traced, few: _Traced, axes: Any, outputs: int, shapes: tuple[PyTree, PyTree], draw: Draw
) -> bool:
    """Whether made-up examples have, each alone with its rows, the outputs of their batch."""
    count = len(jax.tree.leaves(shapes[0]))

    def both(known: list[Any], given: list[Any]) -> tuple[list[Array], list[Array]]:
        constants = few.constants(known)

        def alone(n: Array) -> list[Array]:
            own = [
                x if axis is None else jax.lax.dynamic_slice_in_dim(x, n, 1, axis=axis)
                for x, axis in zip(constants, axes, strict=True)
            ]
            data = (jax.lax.dynamic_slice_in_dim(x, n, 1) for x in given[count:])
            return [x[0] for x in one.run(*own, *given[:count], *data)[:outputs]]

        apart = jax.lax.map(alone, jnp.arange(MANY))
        return few.run(*constants, *given)[:outputs], apart

    known = [abstract(x, x.shape) if isinstance(x, jax.core.Tracer) else x for x in few.known]
    arguments = [*known, *jax.tree.leaves(shapes)]
    with jax.ensure_compile_time_eval():
        arguments = [made_up(x, draw, k) for k, x in enumerate(arguments)]
    known, given = arguments[: len(known)], arguments[len(known) :]
    closed = bounded(jax.make_jaxpr(both)(known, given))
    jaxpr = closed.jaxpr.replace(eqns=live_equations(closed.jaxpr))
    with jax.ensure_compile_time_eval():
        found = jax.jit(jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, closed.consts)))(*arguments)
    together, apart = found[:outputs], found[outputs:]
    return all(map(_is_close, together, apart))


def _is_close(a: Array, b: Array) -> bool:
    change, scale = change_of(np.asarray(a), np.asarray(b))
    tolerance = float(jnp.finfo(jnp.promote_types(a.dtype, jnp.float32)).eps) ** 0.5
    return a.shape == b.shape and change <= max(tolerance, 3e-4) * scale
