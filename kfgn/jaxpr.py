"""The model's jaxpr on one example, flat, and what each of its values depends on.

Nested calls that do not change derivatives (`jit`, `remat`, ...) are inlined by
evaluating the jaxpr under a second trace; custom derivative rules are kept, as
single equations. Equations are evaluated through `jaxpr_as_fun`, so nothing
here depends on how a jax version binds its primitives.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.errors import ModelError, ParameterError
from kfgn.paths import named_leaves, path_name

Array = jax.Array
PyTree = Any
Var = Any  # jex.Var, whose declared type hides the shape and dtype of its aval
Equation = Any  # jex.JaxprEqn, whose operands are variables and literals

# Calls that only group equations, with the parameter that holds their body.
_TRANSPARENT = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


class Role(enum.IntEnum):
    """What a value depends on, hence how the walk treats it."""

    CONSTANT = 0  # neither parameters nor data
    PARAMETER = 1  # parameters only: the same for all examples
    PASSIVE = 2  # data, or not differentiable: differs per example, no derivative needed
    ACTIVE = 3  # data and parameters: the walk goes through it


class FlatModel(NamedTuple):
    """The model on one example as a flat list of equations."""

    jaxpr: jex.Jaxpr
    constants: dict[Var, Any]
    parameters: dict[str, Var]  # by name, in the params' flattening order
    inputs: tuple[Var, ...]
    outputs: tuple[Any, ...]  # variables or literals
    output_tree: Any
    roles: dict[Var, Role]


def flatten_model(
    model: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree
) -> FlatModel:
    """Traces `model` on one example of `inputs` (arrays or shapes) and inlines calls.

    Raises:
      ModelError: the model fails on a batch of one, or loses the batch axis.
      ParameterError: params are empty or not floating point.
    """
    leaves = named_leaves(params)
    _check_parameters(leaves)
    shapes = jax.tree.map(lambda a: _abstract(a, a.shape), params)
    example = jax.tree.map(lambda a: _abstract(a, a.shape[1:]), inputs)

    def single(params, example):
        outputs = _call(model, params, jax.tree.map(lambda a: a[None], example))
        if not jax.tree.leaves(outputs):
            raise ModelError("the model returned no outputs; expected arrays `[batch, ...]`")
        for leaf in jax.tree.leaves(outputs):
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != 1:
                raise ModelError(
                    f"on a batch of one example the model returned an output of shape "
                    f"{jnp.shape(leaf)}; expected a leading batch axis of 1."
                )
        return jax.tree.map(lambda a: a[0], outputs)

    closed, out = jax.make_jaxpr(single, return_shape=True)(shapes, example)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    flat = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*avals)
    jaxpr = flat.jaxpr.replace(eqns=_live(flat.jaxpr))
    names, invars = list(leaves), jaxpr.invars
    parameters = dict(zip(names, invars[: len(names)], strict=True))
    data = tuple(invars[len(names) :])
    return FlatModel(
        jaxpr=jaxpr,
        constants=dict(zip(jaxpr.constvars, flat.consts, strict=True)),
        parameters=parameters,
        inputs=data,
        outputs=tuple(jaxpr.outvars),
        output_tree=jax.tree.structure(out),
        roles=_roles(jaxpr, parameters.values(), data),
    )


def _abstract(array: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    # numpy's float64 means jax's default.
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _call(model: Callable, params: PyTree, inputs: PyTree) -> PyTree:
    """The model's outputs; what goes wrong in it is told with the shapes it was given."""
    try:
        return model(params, inputs)
    except Exception as error:
        raise ModelError(
            f"the model failed with {type(error).__name__}: {error}\nIt was called as "
            f"model(params, inputs) on a batch of one example, with params {_shapes(params)} and "
            f"inputs {_shapes(inputs)}; check that they are the ones it was written for (for a "
            "flax module pass model.apply)."
        ) from error


def _shapes(tree: PyTree) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return ", ".join(f"{path_name(path)} {jnp.shape(leaf)}".strip() for path, leaf in leaves)


def _live(jaxpr: jex.Jaxpr) -> list[Equation]:
    """The equations that the outputs depend on."""
    needed, live = set(variables(jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            live.append(equation)
            needed.update(variables(equation.invars))
    return live[::-1]


def _check_parameters(leaves: dict[str, Any]) -> None:
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


def _inline(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        values = [read(env, v) for v in equation.invars]
        body = equation.params.get(_TRANSPARENT.get(equation.primitive.name, ""))
        if body is None:
            results = bind(equation, values)
        elif isinstance(body, jex.ClosedJaxpr):
            results = _inline(body.jaxpr, body.consts, values)
        else:
            results = _inline(body, (), values)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(env, v) for v in jaxpr.outvars]


def read(env: dict[Var, Any], variable: Any) -> Any:
    """The value of a variable in an environment, or of a literal."""
    return variable.val if isinstance(variable, jex.Literal) else env[variable]


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation, custom derivative rules included."""
    pairs = [(v, x) for v, x in zip(equation.invars, values, strict=True) if _is_var(v)]
    unique = dict(pairs)
    return as_function([equation], list(unique), equation.outvars)(*unique.values())


def as_function(
    equations: Sequence[Equation], inputs: Sequence[Var], outputs: Sequence[Var]
) -> Callable[..., list[Any]]:
    """The function of `inputs` that evaluates the equations and returns `outputs`."""
    jaxpr = _empty_jaxpr().replace(invars=list(inputs), outvars=list(outputs), eqns=list(equations))
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))


@functools.cache
def _empty_jaxpr() -> jex.Jaxpr:
    # A template carries the debug information that the constructor's
    # signature, which differs between jax versions, would ask for.
    return jax.make_jaxpr(lambda: ())().jaxpr


def evaluate(equations: Iterable[Equation], env: dict[Var, Any]) -> None:
    """Evaluates equations in order, adding their results to the environment."""
    for equation in equations:
        values = bind(equation, [read(env, v) for v in equation.invars])
        env.update(zip(equation.outvars, values, strict=True))


def variables(atoms: Iterable[Any]) -> list[Var]:
    """The variables among variables and literals."""
    return [v for v in atoms if _is_var(v)]


def size(variable: Var) -> int:
    """The number of entries of a value, for one example."""
    return int(variable.aval.size)


def is_complex(atom: Any) -> bool:
    """Whether a variable or literal holds complex numbers."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating))


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def with_roles(model: FlatModel, passive: Iterable[Var], active: Iterable[Var] = ()) -> FlatModel:
    """The model with some constants seen as data, and some parameters as values to go through."""
    forced = {**dict.fromkeys(passive, Role.PASSIVE), **dict.fromkeys(active, Role.ACTIVE)}
    roles = _roles(model.jaxpr, model.parameters.values(), model.inputs, forced)
    return model._replace(roles=roles)


def _roles(
    jaxpr: jex.Jaxpr,
    parameters: Iterable[Var],
    inputs: Iterable[Var],
    forced: dict[Var, Role] | None = None,
) -> dict[Var, Role]:
    forced = forced or {}
    roles = dict.fromkeys(jaxpr.constvars, Role.CONSTANT)
    roles.update(dict.fromkeys(parameters, Role.PARAMETER))
    roles.update(dict.fromkeys(inputs, Role.PASSIVE))
    roles.update(forced)
    for equation in jaxpr.eqns:
        found = {roles[v] for v in variables(equation.invars)} or {Role.CONSTANT}
        role = max(found)
        if role is Role.PASSIVE and Role.PARAMETER in found:
            role = Role.ACTIVE
        for out in equation.outvars:
            roles[out] = forced.get(out, _without_derivative(role, equation, out))
    return roles


def _without_derivative(role: Role, equation: Equation, out: Var) -> Role:
    differentiable = jnp.issubdtype(out.aval.dtype, jnp.inexact)
    if differentiable and equation.primitive.name != "stop_gradient":
        return role
    if role is Role.ACTIVE:
        return Role.PASSIVE
    return Role.CONSTANT if role is Role.PARAMETER else role
