"""Dense curvature of small networks: Jacobian, output Hessian, Hessian, Gauss-Newton matrix.

The symbols are those of `kfgn.products`. Rows and columns are the parameters in
the order of `kfgn.paths.named_leaves`, each raveled row-major. A result of more
than 2 GiB is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_flag, check_not_negative
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype, matmul
from kfgn.base.trees import named_leaves
from kfgn.curvature.forward_pass import as_outputs
from kfgn.curvature.per_example import mean_over
from kfgn.objective.loss import flatten_batch
from kfgn.objective.objective import (
    Objective,
    check_batch,
    check_outputs,
    require_batch,
    require_objective,
)

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]

DENSE_BYTES = 2**31  # the most that a dense result may hold


def output_jacobian(objective: Objective) -> Callable[[PyTree, Batch], Array]:
    """`(params, batch) -> J`, `[N, K, P]`: each example's outputs in all parameters.

    One example is worked on at a time, by one backward pass per output.

    Raises:
      OptionError: the result would hold more than 2 GiB.
    """
    require_objective(objective)

    def jacobian(params, batch):
        inputs, _, outputs = require_batch(objective, params, batch)
        dtype = _dtype(params, outputs)
        shape = (_count(inputs), _width(outputs), _number_of(params))
        refuse_large("the Jacobian of the outputs", shape, dtype)
        return jax.lax.map(lambda x: _jacobian_of_one(objective, params, x, dtype)[1], inputs)

    return jacobian


def output_hessian(
    objective: Objective, *, gauss_newton: bool = False
) -> Callable[[PyTree, Batch], Array]:
    """`(params, batch) -> B`, `[N, K, K]`: the loss's Hessian in each example's outputs.

    Args:
      objective: the objective.
      gauss_newton: whether to give the positive semi-definite matrix that
        Gauss-Newton uses; it differs where the loss is not convex.

    Raises:
      OptionError: the result would hold more than 2 GiB.
    """
    require_objective(objective)
    check_flag("gauss_newton", gauss_newton)
    loss = objective.loss
    matrix = loss.gauss_newton_hessian if gauss_newton else loss.hessian

    def hessian(params, batch):
        inputs, targets = check_batch(batch)
        outputs = objective.model(params, inputs)
        check_outputs(loss, outputs, inputs, targets)
        dtype, width = _dtype((), outputs), _width(outputs)
        refuse_large("the Hessian of the outputs", (_count(inputs), width, width), dtype)
        return jax.vmap(matrix)(outputs, targets).astype(dtype)

    return hessian


# Matrices of all parameters.


def dense_hessian(objective: Objective, *, l2: bool = False) -> Callable[[PyTree, Batch], Array]:
    """`(params, batch) -> H`, `[P, P]`: the Hessian of the mean loss, a row at a time.

    Args:
      objective: the objective.
      l2: whether the curvature of the penalty, `l2` times the identity, is added.

    Raises:
      OptionError: the result would hold more than 2 GiB.
    """
    require_objective(objective)
    check_flag("l2", l2)

    def hessian(params, batch):
        _, _, outputs = require_batch(objective, params, batch)
        dtype = _dtype(params, outputs)
        size = _number_of(params)
        refuse_large("the dense Hessian", (size, size), dtype)
        gradient = jax.grad(lambda p: objective.mean_loss(_unravel(p, params), batch))
        push = jax.linearize(gradient, _ravel(params, dtype))[1]
        return _with_penalty(jax.lax.map(push, jnp.eye(size, dtype=dtype)), objective, l2)

    return hessian


def dense_gauss_newton(
    objective: Objective, *, l2: bool = False
) -> Callable[[PyTree, Batch], Array]:
    """`(params, batch) -> G`, `[P, P]`: the mean of `J'BJ`, an example at a time.

    The options and errors are those of `dense_hessian`.
    """
    require_objective(objective)
    check_flag("l2", l2)

    def gauss_newton(params, batch):
        inputs, targets, outputs = require_batch(objective, params, batch)
        dtype = _dtype(params, outputs)
        size = _number_of(params)
        refuse_large("the dense Gauss-Newton matrix", (size, size), dtype)

        def one(example):
            output, j = _jacobian_of_one(objective, params, example[0], dtype)
            b = objective.loss.gauss_newton_hessian(output, example[1]).astype(dtype)
            return matmul(j.T, matmul(b, j))

        return _with_penalty(mean_over(one, (inputs, targets), 1), objective, l2)

    return gauss_newton


def gauss_newton_rank(objective: Objective) -> Callable[..., Array]:
    """`(params, batch, tol=None) -> rank` of the batch's Gauss-Newton matrix, without l2.

    With C_n C_n' = B_n, it is the rank of the rows `C_n' J_n` of all examples,
    `[N R, P]`, and so at most N times the rank of B (appendix E, eq. 63). The
    singular values of the rows are those of G before squaring, which keeps twice
    the digits. They count where they exceed `tol` times the largest; None stands
    for the rounding unit times the larger side.

    Raises:
      OptionError: the rows would hold more than 2 GiB.
    """
    require_objective(objective)

    def rank(params, batch, tol=None):
        if tol is not None:
            check_not_negative("tol", tol)
        inputs, targets, outputs = require_batch(objective, params, batch)
        dtype, size = _dtype(params, outputs), _number_of(params)
        refuse_large("the rows", (_count(inputs), _width(outputs), size), dtype)

        def one(example):
            output, j = _jacobian_of_one(objective, params, example[0], dtype)
            root = objective.loss.hessian_sqrt(output, example[1]).astype(dtype)
            return matmul(root.T, j)

        rows = jax.lax.map(one, (inputs, targets)).reshape(-1, size)
        values = jnp.linalg.svd(rows, compute_uv=False)
        relative = max(rows.shape) * jnp.finfo(dtype).eps if tol is None else tol
        return jnp.sum(values > relative * jnp.max(values, initial=0))

    return rank


def refuse_large(what: str, shape: tuple[int, ...], dtype: Any, remedy: str = "") -> None:
    """Raises OptionError where a dense array would hold more than 2 GiB."""
    needed = math.prod(shape) * jnp.dtype(dtype).itemsize
    if needed > DENSE_BYTES:
        remedy = remedy or (
            "Use kfgn.curvature.hessian_vector_product or gauss_newton_vector_product, which form "
            "no matrix, a smaller network or fewer examples."
        )
        raise OptionError(
            f"{what} would have {' x '.join(map(str, shape))} entries ({needed / 2**30:.1f} GiB); "
            f"the most that is formed is {DENSE_BYTES / 2**30:.0f} GiB. {remedy}"
        )


def _jacobian_of_one(objective, params, example, dtype):
    """One example's outputs, and their Jacobian `[K, P]` by a backward pass for each."""
    one = jax.tree.map(lambda a: a[None], example)
    outputs, pull = jax.vjp(lambda p: objective.model(p, one), params)

    def row(cotangent):
        return _ravel(pull(as_outputs(cotangent[None], outputs))[0], dtype)

    rows = jax.vmap(row)(jnp.eye(flatten_batch(outputs).shape[1], dtype=dtype))
    return jax.tree.map(lambda a: a[0], outputs), rows


def _with_penalty(matrix: Array, objective: Objective, l2: bool) -> Array:
    if not l2:
        return matrix
    weight = jnp.asarray(objective.l2).astype(matrix.dtype)
    return matrix + weight * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def _ravel(tree: PyTree, dtype: Any) -> Array:
    """All leaves as one vector `[P]`."""
    leaves = named_leaves(tree).values()
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def _unravel(vector: Array, like: PyTree) -> PyTree:
    """The inverse of `_ravel`, in the shapes and dtypes of a pytree."""
    leaves, tree = jax.tree.flatten(like)
    parts, start = [], 0
    for leaf in leaves:
        part = vector[start : start + jnp.size(leaf)]
        parts.append(part.reshape(jnp.shape(leaf)).astype(jnp.result_type(leaf)))
        start += jnp.size(leaf)
    return jax.tree.unflatten(tree, parts)


def _number_of(params: PyTree) -> int:
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


def _width(outputs: PyTree) -> int:
    """The number K of outputs of one example."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))


def _count(inputs: PyTree) -> int:
    return jax.tree.leaves(inputs)[0].shape[0]


def _dtype(params: PyTree, outputs: PyTree) -> Any:
    own = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    return factor_dtype(*own, *(x.dtype for x in jax.tree.leaves(outputs)))
