"""The model's jaxpr on one example, flat, and what each of its values depends on.

Nested calls that do not change derivatives (`jit`, `remat`, ...) are inlined,
and loops over parameters unrolled; custom derivative rules are kept, as single
equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.base.errors import ModelError, ParameterError
from kfgn.base.trees import named_leaves, path_name
from kfgn.model.equations import (
    Array,
    Equation,
    Role,
    Var,
    abstract,
    as_function,
    bind,
    evaluate,
    is_complex,
    joined,
    read,
    size,
    variables,
)
from kfgn.model.inline import Value, inline
from kfgn.model.rewrite import reassociate

PyTree = Any

__all__ = [
    "Array",
    "Equation",
    "FlatModel",
    "Role",
    "Var",
    "as_function",
    "bind",
    "differentiated",
    "evaluate",
    "flatten_model",
    "is_complex",
    "read",
    "size",
    "variables",
    "with_roles",
]


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
    shapes = jax.tree.map(lambda a: abstract(a, a.shape), params)
    example = jax.tree.map(lambda a: abstract(a, a.shape[1:]), inputs)

    def single(params, example):
        outputs = _call(model, params, jax.tree.map(lambda a: a[None], example))
        if not jax.tree.leaves(outputs):
            raise ModelError("the model returned no outputs; expected arrays `[batch, ...]`")
        for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                name = f"output {path_name(path)!r}" if path else "the output"
                raise ModelError(
                    f"{name} of the model has dtype {jnp.result_type(leaf)}; expected "
                    "floating-point outputs, which have a derivative: leave labels out."
                )
            if jnp.ndim(leaf) == 0 or leaf.shape[0] != 1:
                raise ModelError(
                    f"on a batch of one example the model returned an output of shape "
                    f"{jnp.shape(leaf)}; expected a leading batch axis of 1."
                )
        return jax.tree.map(lambda a: a[0], outputs)

    closed, out = jax.make_jaxpr(single, return_shape=True)(shapes, example)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    names = list(leaves)

    def inlined(*args):
        roles = [Role.PARAMETER if k < len(names) else Role.PASSIVE for k in range(len(args))]
        return [v.array for v in inline(closed, list(map(Value, args, roles)))]

    flat = jax.make_jaxpr(inlined)(*avals)
    flat = jax.make_jaxpr(lambda *args: reassociate(flat, args, len(names)))(*avals)
    jaxpr = flat.jaxpr.replace(eqns=_live(flat.jaxpr))
    invars = jaxpr.invars
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
        role = joined(roles[v] for v in variables(equation.invars))
        if role is Role.CONSTANT and equation.primitive.name == "optimization_barrier":
            # A recurrent layer's first state is data like the later ones, so that
            # `state @ W` is the same kind of use at every step. It is always
            # correct to treat a constant as data.
            role = Role.PASSIVE
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


def differentiated(model: FlatModel) -> set[Var]:
    """The values that the outputs depend on differentiably."""

    def carry(atoms: Iterable[Any]) -> set[Var]:
        return {v for v in variables(atoms) if model.roles[v] in (Role.PARAMETER, Role.ACTIVE)}

    reached = carry(model.outputs)
    for equation in reversed(model.jaxpr.eqns):
        if reached.intersection(equation.outvars):
            reached |= carry(equation.invars)
    return reached
