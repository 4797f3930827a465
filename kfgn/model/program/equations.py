"""Equations of a jaxpr: what they read, and how they are evaluated.

Equations are evaluated through `jaxpr_as_fun`, so nothing here depends on how
a jax version binds its primitives.
"""

import enum
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

Var = Any  # jex.Var, whose declared type hides the shape and dtype of its aval
Equation = Any  # jex.JaxprEqn, whose operands are variables and literals


class Role(enum.IntEnum):
    """What a value depends on, hence how the walk treats it."""

    CONSTANT = 0  # neither parameters nor data
    PARAMETER = 1  # parameters only: the same for all examples
    PASSIVE = 2  # data, or not differentiable: differs per example, no derivative needed
    ACTIVE = 3  # data and parameters: the walk goes through it


def is_differentiated(role: Role) -> bool:
    """Whether derivatives of a value with this role are ever asked for."""
    return role in (Role.PARAMETER, Role.ACTIVE)


def joined(roles: Iterable[Role]) -> Role:
    """The role of what is made of values with these roles."""
    found = {Role.CONSTANT, *roles}
    if found >= {Role.PARAMETER, Role.PASSIVE}:
        return Role.ACTIVE
    return max(found)


def role_of(roles: Mapping[Var, Role], atom: Any) -> Role:
    """What a variable or literal depends on."""
    return roles[atom] if is_variable(atom) else Role.CONSTANT


def read(env: dict[Var, Any], variable: Any) -> Any:
    """The value of a variable in an environment, or of a literal."""
    return variable.val if isinstance(variable, jex.Literal) else env[variable]


def abstract(array: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape, with the dtype of an array, shape or tracer as jax sees it."""
    dtype = array.dtype
    # numpy's float64 means jax's default. Random keys have a dtype of jax's own.
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype)


def as_array(value: Any, aval: Any) -> Any:
    """A value that may be a literal's Python number, as an array of its dtype."""
    if isinstance(value, jax.Array):
        return value
    if getattr(aval, "weak_type", False):
        number = jnp.asarray(np.asarray(value).item())
        if number.dtype == aval.dtype:
            return number  # promotes as a Python number does
    return jnp.asarray(value, aval.dtype)


def bind(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluates one equation, custom derivative rules included."""
    pairs = [(v, x) for v, x in zip(equation.invars, values, strict=True) if is_variable(v)]
    unique = dict(pairs)
    return as_function([equation], list(unique), equation.outvars)(*unique.values())


def bind_known(equation: Equation, values: Sequence[Any]) -> Sequence[Any]:
    """Evaluates an equation of known values, which are the same on all devices."""
    return values if equation.primitive.name in ("pvary", "pcast") else bind(equation, values)


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
    return [v for v in atoms if is_variable(v)]


def live_equations(jaxpr: jex.Jaxpr, with_effects: bool = False) -> list[Equation]:
    """The equations that the outputs depend on, and those that have effects, if wanted."""
    needed: set[Var] = set(variables(jaxpr.outvars))
    live: list[Equation] = []
    for equation in reversed(jaxpr.eqns):
        acts = with_effects and len(equation.effects) > len(axis_names(equation))
        if needed.intersection(equation.outvars) or acts:
            live.append(equation)
            needed.update(variables(equation.invars))
    return live[::-1]


def without_repeats(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """The jaxpr with what it computes several times computed once, and no zeros added.

    Derivatives by the inputs repeat the values that they are taken at, and the
    derivatives of lower order. Compilers see that, but a layer met twice by the
    same value would be two uses of it.
    """
    names: dict[Var, Var] = {}
    known: dict[Any, Equation] = {}
    equations = []
    for equation in jaxpr.eqns:
        invars = [names.get(v, v) if is_variable(v) else v for v in equation.invars]
        equation = equation.replace(invars=invars)
        if (value := _plus_zero(equation)) is not None:
            names[equation.outvars[0]] = value
            continue
        same = equation if equation.effects else known.setdefault(_computation(equation), equation)
        if same is equation:
            equations.append(equation)
        names.update(zip(equation.outvars, same.outvars, strict=True))
    outvars = [names.get(v, v) if is_variable(v) else v for v in jaxpr.outvars]
    return jaxpr.replace(eqns=equations, outvars=outvars)


def _plus_zero(equation: Equation) -> Var | None:
    """What a zero is added to, as `jax.experimental.jet` does."""
    if equation.primitive.name != "add" or len(found := variables(equation.invars)) != 1:
        return None
    zero = all(np.all(v.val == 0) for v in equation.invars if not is_variable(v))
    return found[0] if zero and found[0].aval == equation.outvars[0].aval else None


def _computation(equation: Equation) -> Any:
    """What equal equations have in common; the equation's identity where that cannot be told."""
    atoms = [
        v if is_variable(v) else (np.asarray(v.val).tobytes(), v.aval) for v in equation.invars
    ]
    key = equation.primitive, tuple(atoms), tuple(sorted(equation.params.items()))
    avals = tuple(v.aval for v in equation.outvars)
    try:
        hash(key)
    except TypeError:
        return id(equation)
    return *key, avals


def count_equations(equations: Iterable[Equation]) -> int:
    """How many equations there are, those in calls and in every iteration of loops included."""
    count = 0
    for equation in equations:
        inner = sum(count_equations(body.eqns) for body in bodies(equation))
        count += (inner or 1) * equation.params.get("length", 1)
    return count


def readers_of(jaxpr: jex.Jaxpr) -> dict[Var, list[Equation | None]]:
    """The equations that read each value; None stands for the output.

    What only looks at a value, as `jax.debug.print` does, reads nothing.
    """
    readers: dict[Var, list[Equation | None]] = {}
    for equation in jaxpr.eqns:
        for v in set(variables(equation.invars)) if equation.outvars else ():
            readers.setdefault(v, []).append(equation)
    for v in variables(jaxpr.outvars):
        readers.setdefault(v, []).append(None)
    return readers


def size(variable: Var) -> int:
    """The number of entries of a value, for one example."""
    return int(variable.aval.size)


def axis_names(equation: Equation) -> set[Any]:
    """The named axes that an equation's collectives go over, those inside of it included."""
    # The class of these effects is not public.
    return {e.name for e in equation.effects if type(e).__name__ == "NamedAxisEffect"}


def bodies(equation: Equation) -> list[jex.Jaxpr]:
    """The jaxprs that an equation holds: of a call, a loop, or branches."""
    values: list[Any] = []
    for value in equation.params.values():
        values += value if isinstance(value, (tuple, list)) else [value]
    inner = [getattr(value, "jaxpr", value) for value in values]
    return [body for body in inner if isinstance(body, jex.Jaxpr)]


def is_complex(atom: Any) -> bool:
    """Whether a variable or literal holds complex numbers."""
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.complexfloating))


def is_variable(atom: Any) -> bool:
    """Whether an operand is no literal."""
    return not isinstance(atom, jex.Literal)
