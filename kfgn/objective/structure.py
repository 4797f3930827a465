"""The structure of an output Hessian: whether it is diagonal, and a square root of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Float

from kfgn.base.linalg import precision
from kfgn.base.types import Array

# Entry i of the result depends on entry i of each operand of its shape, and on scalars.
_ENTRYWISE = {"add", "add_any", "convert_element_type", "copy", "div", "mul", "neg"}
_ENTRYWISE |= {"select_n", "sub"}
# Entries stay in their order where their number stays.
_RESHAPES = {"broadcast_in_dim", "concatenate", "expand_dims", "reshape", "split", "squeeze"}
_CALLS = {"jit", "pjit"}


def is_entrywise(function: Callable[[Array], Array], x: Float[Array, " K"]) -> bool:
    """Whether entry i of `function(x)` certainly depends on entry i of x alone.

    Every equation of the function that x reaches must be one of arithmetic between
    arrays of K entries, which is what products with a diagonal matrix consist of;
    anything else that reaches the result makes the answer False.
    """
    if x.size == 1:
        return True
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    return _follow(jaxpr, [True], x.size) != [False]


def _follow(jaxpr: core.Jaxpr, given: Sequence[bool | None], size: int) -> list[bool | None]:
    """Of each result: None where it does not depend on x, else whether it does entry by entry."""
    state = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: core.Literal | core.Var) -> bool | None:
        return None if isinstance(atom, core.Literal) else state.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if all(operand is None for operand in operands):
            continue
        name, results = equation.primitive.name, equation.outvars
        shapes: list[Any] = [result.aval for result in results]
        if name in _CALLS:
            found = _follow(equation.params["jaxpr"].jaxpr, operands, size)
        else:
            keeps = False not in operands and _keeps_entries(equation)
            keeps &= all(math.prod(shaped.shape) == size for shaped in shapes)
            found = [keeps] * len(results)
        state.update(zip(results, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _keeps_entries(equation: core.JaxprEqn) -> bool:
    """Whether an equation works entry by entry if its results are as large as the operands."""
    name, parameters = equation.primitive.name, equation.params
    if name == "transpose":
        return parameters["permutation"] == tuple(range(len(parameters["permutation"])))
    if name == "dot_general":  # of a number and an array, as in the gradient of a dot product
        operands: list[Any] = [atom.aval for atom in equation.invars]
        return min(math.prod(operand.shape) for operand in operands) == 1
    return name in _ENTRYWISE or (name in _RESHAPES and parameters.get("dimensions") is None)


def semi_definite_part(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The nearest positive semi-definite matrix: negative eigenvalues set to zero."""
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.maximum(values, 0)) @ vectors.T


def root_of_part(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """`C` with `C C'` the nearest positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))


def semi_definite_root(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """`C` with `C C'` a positive semi-definite matrix, which may be singular.

    Cholesky's method where the pivot is the largest entry left on the diagonal:
    once that is roundoff, all that is left of the matrix is, and columns are zero.
    """
    size = matrix.shape[0]
    diagonal, index = jnp.diag(matrix), jnp.arange(size)
    floor = size * jnp.finfo(matrix.dtype).eps * jnp.max(diagonal)

    def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        root, left = carry  # `left` is the diagonal of `matrix - root root'`, -inf where done
        pivot = jnp.argmax(left)
        size_of = left[pivot]
        roundoff = size_of <= floor  # not where it is NaN
        length = jnp.sqrt(jnp.where(roundoff, 1, size_of))
        known = jnp.matmul(root, root[pivot], precision=precision())
        column = jnp.where(index == pivot, length, (matrix[:, pivot] - known) / length)
        column = jnp.where(roundoff | (left == -jnp.inf), 0, column)
        left = jnp.where(index == pivot, -jnp.inf, left - jnp.square(column))
        return root.at[:, k].set(column), left

    root, _ = jax.lax.fori_loop(0, size, step, (jnp.zeros_like(matrix), diagonal))
    return root
