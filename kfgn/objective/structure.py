"""The structure of an output Hessian: whether it is diagonal, and a square root of it."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Float

from kfgn.base.decompositions import eigh
from kfgn.base.linalg import precision
from kfgn.base.types import Array, Shape

# Entry i of the result depends on entry i of each operand of its shape, and on scalars.
_ENTRYWISE = {"add", "add_any", "convert_element_type", "copy", "div", "mul", "neg"}
_ENTRYWISE |= {"select_n", "sub"}
# Entries stay in their order where their number stays.
_RESHAPES = {"broadcast_in_dim", "expand_dims", "reduce_sum", "reshape", "squeeze"}
_CALLS = {"jit", "pjit"}

#: What an array has of x: None for nothing, False for what is not followed, or the k with
#: which its entry i depends on entry k + i of x alone.
_Part: TypeAlias = int | bool | None


def is_entrywise(function: Callable[[Array], Array], x: Float[Array, " K"]) -> bool:
    """Whether entry i of `function(x)` certainly depends on entry i of x alone.

    Every equation of the function that x reaches must be one of arithmetic between the
    same entries of x, or cut or join stretches of them, which is what products with a
    diagonal matrix consist of, for a pytree too; anything else makes the answer False.
    """
    if x.size == 1:
        return True
    jaxpr = jax.make_jaxpr(function)(x).jaxpr
    (found,) = _follow(jaxpr, [0])
    return found is None or (found is not False and found == 0)


def _follow(jaxpr: core.Jaxpr, given: Sequence[_Part]) -> list[_Part]:
    """What each result has of x, from what the inputs have."""
    state = dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: core.Literal | core.Var) -> _Part:
        return None if isinstance(atom, core.Literal) else state.get(atom)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if all(operand is None for operand in operands):
            continue
        if equation.primitive.name in _CALLS:
            found = _follow(equation.params["jaxpr"].jaxpr, operands)
        elif any(operand is False for operand in operands):
            found = [False] * len(equation.outvars)
        else:
            found = _parts_of(equation, operands)
        state.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _parts_of(equation: core.JaxprEqn, operands: list[_Part]) -> list[_Part]:
    """Of the results of an equation, some of whose operands are parts of x."""
    name, parameters = equation.primitive.name, equation.params
    given: list[Any] = [atom.aval for atom in equation.invars]
    results: list[Any] = [atom.aval for atom in equation.outvars]
    sizes = [math.prod(x.shape) for x in given]
    if name in ("concatenate", "split"):
        # One stretch after the other, as the axis is the first that is longer than 1.
        axis = parameters["dimension" if name == "concatenate" else "axis"]
        whole = results[0] if name == "concatenate" else given[0]
        if math.prod(whole.shape[:axis]) != 1:
            return [False] * len(results)
        if name == "split":
            starts = _starts([math.prod(x.shape) for x in results])
            return [operands[0] + start for start in starts]  # type: ignore[operator]
        pairs = zip(operands, _starts(sizes), strict=True)
        return [_one_of({part - start for part, start in pairs if part is not None})]
    if name in ("slice", "pad"):
        moved = _cut(given[0].shape, results[0].shape, name, parameters)
        own, *filled = operands  # what is filled in is the same for all entries
        found = moved is not None and own is not None and filled in ([], [None])
        return [own + moved if found else False]  # type: ignore[operator]
    size = math.prod(results[0].shape)
    same = all(n == size for n, part in zip(sizes, operands, strict=True) if part is not None)
    if not same or len(results) > 1 or not _keeps_entries(name, parameters, sizes):
        return [False] * len(results)
    return [_one_of({part for part in operands if part is not None})]


def _starts(sizes: list[int]) -> list[int]:
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def _one_of(parts: set[Any]) -> _Part:
    """That of which all operands have the same entries."""
    return parts.pop() if len(parts) == 1 else False


def _cut(given: Shape, result: Shape, name: str, parameters: dict[str, Any]) -> int | None:
    """How many entries a slice leaves out at the start, less those that padding adds there."""
    if name == "slice":
        first = parameters["start_indices"]
        if any(stride != 1 for stride in parameters["strides"] or ()):
            return None
    else:
        first = [-low for low, _, _ in parameters["padding_config"]]
        if any(inside for _, _, inside in parameters["padding_config"]):
            return None
    changed = [k for k in range(len(given)) if given[k] != result[k] or first[k]]
    if not changed:
        return 0
    axis = changed[0]
    if len(changed) > 1 or math.prod(given[:axis]) != 1:
        return None
    return int(first[axis]) * math.prod(given[axis + 1 :])


def _keeps_entries(name: str, parameters: dict[str, Any], sizes: list[int]) -> bool:
    """Whether a primitive works entry by entry if its result is as large as what it is of."""
    if name == "transpose":
        return bool(parameters["permutation"] == tuple(range(len(parameters["permutation"]))))
    if name == "dot_general":  # of a number and an array, as in the gradient of a dot product
        return min(sizes) == 1
    reorders = name == "reshape" and parameters["dimensions"] is not None
    return name in _ENTRYWISE or (name in _RESHAPES and not reorders)


def semi_definite_part(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The nearest positive semi-definite matrix: negative eigenvalues set to zero."""
    values, vectors = eigh(matrix)
    return (vectors * jnp.maximum(values, 0)) @ vectors.T


def root_of_part(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """`C` with `C C'` the nearest positive semi-definite matrix."""
    values, vectors = eigh(matrix)
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
