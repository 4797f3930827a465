"""Decompositions of stacks of matrices, which on CPU take turns.

jaxlib (seen in 0.10.2, not in 0.12.0) spreads a stack over XLA's threads, and the thread that
asked for it waits: two stacks at once on two cores wait for each other for ever. One matrix
after another needs no other thread, in stacks that `jax.vmap` makes as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.types import Array


def _in_turns(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function of a matrix as one of stacks of them: all at once, but in turn on CPU."""
    one = jax.custom_batching.custom_vmap(function)

    @one.def_vmap
    def _(size: int, batched: list[bool], stack: Array) -> tuple[Any, Any]:
        found = jax.lax.platform_dependent(
            stack, cpu=lambda matrices: jax.lax.map(one, matrices), default=jax.vmap(function)
        )
        return found, jax.tree.map(lambda _: True, found)

    def of_stack(stack: Array) -> Any:
        own = one
        for _ in stack.shape[:-2]:
            own = jax.vmap(own)
        return own(stack)

    return of_stack


_eigh = _in_turns(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
_eigvalsh = _in_turns(lambda matrix: jnp.linalg.eigvalsh(matrix))
_lower = _in_turns(lambda matrix: jax.lax.linalg.cholesky(matrix, symmetrize_input=False))


def eigh(stack: Float[Array, "*S d d"]) -> tuple[Float[Array, "*S d"], Float[Array, "*S d d"]]:
    """Eigenvalues in ascending order and eigenvectors, the columns, of symmetric matrices."""
    values, vectors = _eigh(stack)
    return values, vectors


def eigvalsh(stack: Float[Array, "*S d d"]) -> Float[Array, "*S d"]:
    """Eigenvalues of symmetric matrices, in ascending order."""
    values: Array = _eigvalsh(stack)
    return values


def cholesky(stack: Float[Array, "*S d d"]) -> Float[Array, "*S d d"]:
    """`L` with `L L'` each matrix, of which only the lower triangle is read."""
    lower: Array = _lower(stack)
    return lower


def inverse_of_lower(stack: Float[Array, "*S d d"]) -> Float[Array, "*S d d"]:
    """`L^-1` of lower triangular matrices."""
    inverse: Array = _inverse_of_lower(stack)
    return inverse


@_in_turns
def _inverse_of_lower(lower: Float[Array, "d d"]) -> Float[Array, "d d"]:
    identity = jnp.eye(lower.shape[0], dtype=lower.dtype)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
