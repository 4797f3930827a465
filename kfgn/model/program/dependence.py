"""How an equation's outputs depend on its operands: by its primitive's row, and their roles."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import OptionError
from kfgn.model.program.equations import Equation, Role, Var, is_variable, role_of, variables
from kfgn.model.program.primitives import row_of

Roles = Mapping[Var, Role]


def is_linear(equation: Equation, roles: Roles) -> bool:
    """Whether the Jacobian is the same for every example (offsets may differ)."""
    row, found = row_of(equation), [role_of(roles, atom) for atom in equation.invars]
    if row.multilinear:
        return found.count(Role.ACTIVE) == 1 and Role.PASSIVE not in found
    # A passive operand in a linear position is an offset, elsewhere a factor. Data that
    # are no floating-point numbers, such as indices, are no offsets.
    return bool(row.linear_in) and all(
        role < Role.PASSIVE or (k in row.linear_in and _is_real_or_complex(atom))
        for k, (role, atom) in enumerate(zip(found, equation.invars, strict=True))
    )


def _is_real_or_complex(atom: Any) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def is_elementwise(equation: Equation, roles: Roles) -> bool:
    """Whether output entry i depends on entry i of each differentiable operand alone."""
    entries = equation.outvars[0].aval.size
    active = [a for a in equation.invars if role_of(roles, a) is Role.ACTIVE]
    # A differentiable value that is broadcast has a column, no diagonal.
    return all(v.aval.size == entries for v in active) and acts_by_entry(equation)


def acts_by_entry(equation: Equation) -> bool:
    """Whether entry i of the one result depends on entry i of each operand alone."""
    if len(equation.outvars) != 1:
        return False
    entries = equation.outvars[0].aval.size
    if any(v.aval.size not in (1, entries) for v in variables(equation.invars)):
        return False
    row = row_of(equation)
    if row.elementwise or keeps_order(equation):
        return True
    body = equation.params.get(row.body)
    return body is not None and all(map(acts_by_entry, getattr(body, "jaxpr", body).eqns))


def joins_freely(equation: Equation, roles: Roles) -> bool:
    """Whether a chain of elementwise operations should take this equation in.

    A sum of several differentiable values stays outside: as a linear node it
    merely copies the curvature to its summands.
    """
    active = [a for a in equation.invars if role_of(roles, a) is Role.ACTIVE]
    return is_elementwise(equation, roles) and (len(active) == 1 or not is_linear(equation, roles))


def keeps_order(equation: Equation) -> bool:
    """Whether the equation only reshapes or casts its one operand."""
    atoms = equation.invars
    if len(atoms) != 1 or len(equation.outvars) != 1:
        return False
    if equation.primitive.name == "transpose" and "permutation" in equation.params:
        # Axes of one entry may go anywhere: vmap of `W @ x` leaves such a transpose.
        shape = atoms[0].aval.shape
        long = [axis for axis in equation.params["permutation"] if shape[axis] != 1]
        return long == sorted(long)
    return row_of(equation).keeps_order and atoms[0].aval.size == equation.outvars[0].aval.size


def moves_entries(equation: Equation) -> bool:
    """Whether the equation only moves, repeats or drops the entries of its one operand."""
    return row_of(equation).moves is not None and len(variables(equation.invars)) == 1 == len(
        equation.invars
    )


def moved(equation: Equation, labels: np.ndarray, output: int = 0) -> np.ndarray:
    """Labels of the operand's entries, moved as the equation moves the entries."""
    moves, shape = row_of(equation).moves, equation.outvars[output].aval.shape
    assert moves is not None
    found = np.asarray(moves(labels, equation, output))
    if found.shape != shape:
        raise OptionError(
            f"moves of primitive {equation.primitive.name!r} makes {found.shape} of "
            f"{labels.shape}, expected {shape}"
        )
    return found


def scaling(equation: Equation) -> float | None:
    """The factor of an operation with one number, such as `2 W`, `W / 3` or `1 + W`."""
    row, atoms = row_of(equation), equation.invars
    own = [k for k, atom in enumerate(atoms) if is_variable(atom)]
    numbers: list[Any] = [atom.val for atom in atoms if not is_variable(atom)]
    if len(own) != 1 or len(numbers) != len(atoms) - 1 or any(map(np.ndim, numbers)):
        return None
    if len(row.signs) == len(atoms):
        return row.signs[own[0]]
    if (
        row.by_number is None
        or np.iscomplexobj(numbers)
        or not (row.multilinear or own[0] in row.linear_in)
    ):
        return None
    return row.by_number(*numbers)
