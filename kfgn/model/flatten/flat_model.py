"""The model's jaxpr on one example, flat, and what each of its values depends on.

Nested calls that do not change derivatives (`jit`, `remat`, ...) are inlined;
loops over parameters are unrolled, or kept with flat bodies; custom derivative
rules are kept, as single equations. So are effects, such as those of `jax.debug.print`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.base.devices import vary_shapes, varying_axes
from kfgn.base.errors import ModelError, ParameterError
from kfgn.base.trees import batch_of, first_of, named_leaves, path_name
from kfgn.base.types import PyTree
from kfgn.model.flatten.auxiliary import Aux
from kfgn.model.flatten.custom_vjp import holds_rule
from kfgn.model.flatten.guards import unguarded
from kfgn.model.flatten.inline import Value, inline
from kfgn.model.flatten.loops import Loop, Loops, all_equations
from kfgn.model.flatten.named_axis import Axis, check_collectives, is_alike, trace
from kfgn.model.flatten.numbered import over_rows
from kfgn.model.flatten.reassociate import reassociated
from kfgn.model.flatten.roles import assign_roles, reached_values
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    abstract,
    axis_names,
    is_differentiated,
    live_equations,
    readers_of,
    variables,
    without_repeats,
)
from kfgn.model.program.primitives import REMAT


@dataclasses.dataclass(frozen=True, eq=False)
class FlatModel:
    """The model on one example as a flat list of equations."""

    jaxpr: jex.Jaxpr
    constants: dict[Var, Any]
    parameters: dict[str, Var]  # by name, in the params' flattening order
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]  # variables or literals
    output_tree: Any
    roles: dict[Var, Role]
    loops: Loops  # over parameters that are kept
    axis_name: Hashable | None = None  # of examples
    aux: Aux | None = None

    # Further annotations, each made once.

    @functools.cached_property
    def every_equation(self) -> list[tuple[Equation, tuple[Loop, ...]]]:
        """Those of loops, too, each with the loops around it, but for the loops themselves."""
        return list(all_equations(self.jaxpr, self.loops))

    @property
    def equations(self) -> list[Equation]:
        """Those that the outputs depend on, then those of aux alone."""
        return [*self.jaxpr.eqns, *(self.aux.equations if self.aux else ())]

    @functools.cached_property
    def statistics(self) -> list[Var]:
        """What collectives over the axis of examples make, for the outputs."""
        equations = filter(self.is_collective, self.jaxpr.eqns)
        return [v for equation in equations for v in equation.outvars]

    def is_collective(self, equation: Equation) -> bool:
        """Whether an equation looks at other examples."""
        return self.axis_name is not None and self.axis_name in axis_names(equation)

    @functools.cached_property
    def varying(self) -> set[Var]:
        """The values that differ from example to example."""
        found = set(self.inputs)
        for equation in self.equations:
            if self.is_collective(equation):
                varies = not is_alike(equation)
            else:
                varies = not found.isdisjoint(variables(equation.invars))
            if varies:
                found.update(equation.outvars)
        return found

    @functools.cached_property
    def readers(self) -> dict[Var, list[Equation | None]]:
        """The equations that read each value; None stands for the model's output."""
        bodies = [readers_of(loop.body) for loop in self.loops.values()]
        return functools.reduce(operator.or_, bodies, readers_of(self.jaxpr))

    @functools.cached_property
    def reverse_only(self) -> bool:
        """Whether derivatives pass a `custom_vjp` rule, which jax knows backwards only."""
        return any(
            any(is_differentiated(self.roles[v]) for v in variables(equation.invars))
            and holds_rule(equation)
            for equation, _ in self.every_equation
        )

    @functools.cached_property
    def reached(self) -> dict[Var, dict[Loop, int]]:
        """The values that the outputs depend on differentiably.

        For one inside of loops, how many of their last iterations do without it.
        """
        return reached_values(self.jaxpr, self.roles, self.loops)


def flatten_model(
    model: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    axis: Axis | None = None,
    aux_axes: Sequence[int | None] | None = None,
    unroll: bool = True,
) -> FlatModel:
    """Traces `model` on one example of `inputs` (arrays or shapes) and inlines calls.

    It runs under `axis`, the axis of examples. With `aux_axes`, the axis of the batch in
    each leaf of aux, it returns `(outputs, aux)`. Loops over parameters are unrolled, or
    else kept.

    Raises:
      ModelError: the model fails on a batch of one, or loses the batch axis.
      ParameterError: params are empty or not floating point.
    """
    leaves = named_leaves(params)
    check_parameters(leaves)
    shapes = jax.tree.map(lambda a: abstract(a, a.shape), params)
    example = jax.tree.map(lambda a: abstract(a, a.shape[1:]), inputs)
    # Where the batch varies over devices, constants that meet it must be cast, too.
    axes = varying_axes((params, inputs))
    shapes, example = vary_shapes((shapes, example), axes)

    def single(params: PyTree, example: PyTree) -> PyTree:
        outputs, aux = call_model(model, params, batch_of(example)), None
        if aux_axes is not None:
            outputs, aux = outputs
            leaves, tree = jax.tree.flatten(aux)
            pairs = zip(leaves, aux_axes, strict=True)
            aux = jax.tree.unflatten(
                tree, [x if k is None else jnp.squeeze(x, k) for x, k in pairs]
            )
        if not jax.tree.leaves(outputs):
            raise ModelError("the model returned no outputs; expected arrays `[batch, ...]`")
        for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                name = f"output {path_name(path)!r}" if path else "the output"
                raise ModelError(
                    f"{name} of the model has dtype {jnp.result_type(leaf)}; expected "
                    "floating-point outputs, which have a derivative: leave labels out, or return "
                    "(outputs, aux) with kfgn.Objective(..., has_aux=True)."
                )
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != 1:
                raise ModelError(
                    f"on a batch of one example the model returned an output of shape "
                    f"{jnp.shape(leaf)}; expected a leading batch axis of 1."
                )
        return first_of(outputs), aux

    closed, (out, aux) = trace(single, axis, shapes, example)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    names = list(leaves)

    def inlined(*args: Any) -> list[Any]:
        roles = [Role.PARAMETER if k < len(names) else Role.PASSIVE for k in range(len(args))]
        return [v.array for v in inline(closed, list(map(Value, args, roles)), unroll=unroll)]

    flat, _ = trace(inlined, axis, *vary_shapes(avals, axes))
    if not unroll:
        flat = over_rows(flat, axis)
    invars = flat.jaxpr.invars
    parameters = dict(zip(names, invars[: len(names)], strict=True))
    data = tuple(invars[len(names) :])
    jaxpr = flat.jaxpr.replace(eqns=live_equations(flat.jaxpr, with_effects=True))
    jaxpr = without_repeats(jaxpr)
    axis_name = axis[0] if axis else None
    every, loops = _all_loops(jaxpr), dict[int, Loop]()
    roles = assign_roles(jaxpr, parameters.values(), data, every, axis_name=axis_name)
    whole = _reassociated(jaxpr, roles, loops)
    count = len(jax.tree.leaves(out))
    jaxpr = whole.replace(outvars=whole.outvars[:count])
    jaxpr = jaxpr.replace(eqns=live_equations(jaxpr, with_effects=True))
    inside = set(map(id, jaxpr.eqns))
    beside = tuple(e for e in whole.eqns if id(e) not in inside)
    roles = assign_roles(whole, parameters.values(), data, loops, axis_name=axis_name)
    check_collectives(whole.eqns, axis_name, roles)
    beside_outputs = None
    if aux_axes is not None:
        atoms = tuple(whole.outvars[count:])
        beside_outputs = Aux(jax.tree.structure(aux), atoms, tuple(aux_axes), beside)
    return FlatModel(
        jaxpr=jaxpr,
        constants=dict(zip(jaxpr.constvars, flat.consts, strict=True)),
        parameters=parameters,
        inputs=data,
        outputs=tuple(jaxpr.outvars),
        output_tree=jax.tree.structure(out),
        roles=roles,
        loops=loops,
        axis_name=axis_name,
        aux=beside_outputs,
    )


_LOOPS = ("scan", *REMAT)


def _loop(equation: Equation) -> Loop:
    body = equation.params["jaxpr"]
    body, values = getattr(body, "jaxpr", body), getattr(body, "consts", ())
    constants = dict(zip(body.constvars, values, strict=True))
    return Loop(equation, without_repeats(body), constants)


def _all_loops(jaxpr: jex.Jaxpr) -> dict[int, Loop]:
    """Every loop and region, also in the bodies of others."""
    found: dict[int, Loop] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in _LOOPS:
            found[id(equation)] = _loop(equation)
            found |= _all_loops(found[id(equation)].body)
    return found


def _reassociated(jaxpr: jex.Jaxpr, roles: Mapping[Var, Role], loops: dict[int, Loop]) -> jex.Jaxpr:
    """The jaxpr in another order, and the bodies of loops that are differentiated."""
    for equation in jaxpr.eqns:
        known = [roles[v] for v in variables(equation.invars)]
        if equation.primitive.name in _LOOPS and any(map(is_differentiated, known)):
            loop = _loop(equation)
            flat = _reassociated(loop.body, roles, loops)
            loops[id(equation)] = dataclasses.replace(loop, body=flat)
    return reassociated(unguarded(jaxpr, roles), roles)


_NNX = (
    "A model of flax's nnx changes its state when it is called, and has to be made anew for that: "
    "nnx.merge(graphdef, params, rest, copy=True)(inputs).\n"
)


def call_model(model: Callable, params: PyTree, inputs: PyTree) -> PyTree:
    """The model's outputs; what goes wrong in it is told with the shapes it was given."""
    try:
        return model(params, inputs)
    except ModelError:
        raise
    except Exception as error:
        stale = type(error).__name__ == "TraceContextError"
        raise ModelError(
            f"the model failed with {type(error).__name__}: {error}\n{_NNX * stale}It was called "
            "as model(params, inputs) on a batch of one example, with params "
            f"{_shapes(params)} and inputs {_shapes(inputs)}; check that they are the ones it was "
            "written for (for a flax module pass model.apply)."
        ) from error


def _shapes(tree: PyTree) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return ", ".join(f"{path_name(path)} {jnp.shape(leaf)}".strip() for path, leaf in leaves)


def check_parameters(leaves: dict[str, Any]) -> None:
    """Raises ParameterError unless there are leaves, all of them floating-point arrays."""
    if not leaves:
        raise ParameterError("params have no leaves: expected a pytree of floating-point arrays")
    for name, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            found = f"dtype {dtype}" if dtype is not None else f"a {type(leaf).__name__}"
            raise ParameterError(
                f"parameter {name!r} must be a floating-point array, found {found}; keep "
                "counters and other state out of the trainable params."
            )


def with_roles(model: FlatModel, passive: Iterable[Var], active: Iterable[Var] = ()) -> FlatModel:
    """The model with some constants seen as data, and some parameters as values to go through."""
    forced = {**dict.fromkeys(passive, Role.PASSIVE), **dict.fromkeys(active, Role.ACTIVE)}
    whole = model.jaxpr.replace(eqns=model.equations)
    known = model.parameters.values(), model.inputs, model.loops
    roles = assign_roles(whole, *known, forced, model.axis_name)
    return dataclasses.replace(model, roles=roles)
