"""Whether what a model is made of can be differentiated, and what kfgn knows of it."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.errors import ModelError, UnknownPrimitiveWarning
from kfgn.base.types import Array
from kfgn.model.flatten.flat_model import FlatModel
from kfgn.model.layers.layer_kinds import LAYERS
from kfgn.model.program.equations import (
    Equation,
    Role,
    Var,
    as_function,
    is_differentiated,
    variables,
)
from kfgn.model.program.primitives import is_differentiable, is_known

_announced: set[str] = set()


def check_derivatives(model: FlatModel) -> None:
    """Looks at the equations on the way from the parameters to the outputs.

    Raises:
      ModelError: one of them has no derivative backwards.

    Warns:
      UnknownPrimitiveWarning: once per name, for a primitive that is neither
        jax's nor registered.
    """
    needed, checked = model.reached, set[Any]()
    for equation, _ in model.every_equation:
        operands = _differentiated(model, equation.invars)
        results = [v for v in equation.outvars if v in needed]
        if not operands or not equation.outvars or model.is_collective(equation):
            continue
        key = _key(equation, operands, results)
        if not is_differentiable(equation) and key not in checked:
            _check_derivative(equation, operands, results)
            checked |= {key} - {None}
        known = is_known(equation) or equation.primitive.name in LAYERS
        if not known and any(model.roles[v] is Role.ACTIVE for v in results):
            _announce(equation.primitive.name)


def _key(equation: Equation, operands: list[Var], results: list[Var]) -> Any:
    """Equal for equations that are alike; None for one with parameters that cannot be compared."""
    values = [
        (atom.aval.shape, atom.aval.dtype, atom in operands) for atom in variables(equation.invars)
    ]
    key = (
        equation.primitive,
        (*equation.params.items(),),
        (*values,),
        (*(v in results for v in equation.outvars),),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _differentiated(model: FlatModel, atoms: Sequence) -> list[Var]:
    found = dict.fromkeys(variables(atoms))
    return [v for v in found if is_differentiated(model.roles[v])]


def _check_derivative(equation: Equation, operands: list[Var], results: list[Var]) -> None:
    """Traces the pull-back from `results`, those that are differentiated; there may be none."""
    others = [v for v in dict.fromkeys(variables(equation.invars)) if v not in operands]
    function = as_function([equation], [*operands, *others], results)

    def pull_back(values: list[Array], constants: list[Array]) -> tuple[Array, ...]:
        outputs, pull = jax.vjp(lambda *x: function(*x, *constants), *values)
        return pull([jnp.ones_like(o) for o in outputs])

    shapes = [
        [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in part]
        for part in (operands, others)
    ]
    try:
        jax.eval_shape(pull_back, *shapes)
    except Exception as error:
        raise ModelError(_no_derivative(equation.primitive.name, error)) from error


def _no_derivative(name: str, error: Exception) -> str:
    if name == "while":
        remedy = (
            "write the loop with jax.lax.scan, or with jax.lax.fori_loop whose bounds are Python "
            "numbers"
        )
    else:
        remedy = "give it a derivative, as by calling it in a function with a jax.custom_jvp rule"
    return (
        f"the primitive {name!r} cannot be differentiated backwards here, where the outputs "
        f"depend on parameters through it: {type(error).__name__}: {error}\nEither {remedy}; or "
        "pass its operands through jax.lax.stop_gradient, if no derivative should go through it."
    )


def _announce(name: str) -> None:
    if name in _announced:
        return
    warnings.warn(
        f"kfgn does not know the primitive {name!r}. Its derivative is taken for every example on "
        "its own, which is correct, but slower than need be if the primitive is linear, or acts "
        "on every entry alone. To say so, or to silence this warning: "
        f'kfgn.layers.register_primitive({name!r}, kind), with kind "linear", "multilinear", '
        '"elementwise", "reshape" or "general".',
        UnknownPrimitiveWarning,
        stacklevel=2,
    )
    _announced.add(name)  # not where the warning is raised as an error
