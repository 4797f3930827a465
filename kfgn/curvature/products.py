"""Products of the Hessian and the Gauss-Newton matrix of all parameters with vectors.

With the penalty's weight l2, J_n the Jacobian of example n's K outputs in all P
parameters, and B_n the loss's Hessian in those outputs,

    G = (1/N) sum_n J_n' B_n J_n  (+ l2 I),
    H = (1/N) sum_n (J_n' B_n J_n + sum_k (dE_n / do_k) (d²o_nk / dθ²))  (+ l2 I),

where B_n is projected to a semi-definite matrix in G if the loss is not convex.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfgn.base.checks import check_flag
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype
from kfgn.curvature.forward_pass import as_outputs
from kfgn.objective.loss import flatten_batch
from kfgn.objective.objective import (
    Objective,
    check_batch,
    check_outputs,
    check_vector,
    require_batch,
    require_objective,
)

Array = jax.Array
PyTree = Any
Batch = tuple[PyTree, PyTree]
Product = Callable[[PyTree, Batch, PyTree], PyTree]


def hessian_vector_product(
    objective: Objective, *, l2: bool = False, chunk_size: int | None = None
) -> Product:
    """`(params, batch, vector) -> H vector`, `vector` a pytree like params.

    Args:
      objective: the objective.
      l2: whether the curvature of the penalty, `l2` times the identity, is added.
      chunk_size: None takes all examples at once; a number takes the mean over
        chunks of so many, in memory that does not grow with the batch.

    Raises:
      OptionError: an option has a wrong value.
      ParameterError: the vector is not like params.
    """

    def product(params, batch, vector):
        gradient = jax.grad(lambda p: objective.mean_loss(p, batch))
        return jax.jvp(gradient, (params,), (vector,))[1]

    return _finished(objective, product, l2, chunk_size)


def gauss_newton_vector_product(
    objective: Objective, *, l2: bool = False, chunk_size: int | None = None
) -> Product:
    """`(params, batch, vector) -> J'HJ vector`, eq. (13), by the R-operator.

    The options are those of `hessian_vector_product`.
    """

    def product(params, batch, vector):
        inputs, targets = check_batch(batch)
        outputs, push = jax.linearize(lambda p: objective.model(p, inputs), params)
        check_outputs(objective.loss, outputs, inputs, targets)
        pushed = flatten_batch(push(vector))
        curved = jax.vmap(objective.loss.gauss_newton_product)(outputs, targets, pushed)
        mean = as_outputs(curved / curved.shape[0], outputs)
        (result,) = jax.linear_transpose(push, params)(mean)
        return result

    return _finished(objective, product, l2, chunk_size)


def _finished(objective: Objective, product: Product, l2: bool, chunk_size: int | None) -> Product:
    """The product with its vector checked, in chunks, and with the penalty, as asked."""
    require_objective(objective)
    check_flag("l2", l2)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise OptionError(
            f"chunk_size must be None or an integer of at least 1, found {chunk_size!r}"
        )

    def finished(params, batch, vector):
        check_vector(params, vector)
        if chunk_size is None:
            result = product(params, batch, vector)
        else:
            result = _mean_over_chunks(objective, product, chunk_size, params, batch, vector)
        if not l2:
            return result
        weight = jnp.asarray(objective.l2)
        return jax.tree.map(lambda r, v: r + (weight.astype(r.dtype) * v), result, vector)

    return finished


def _mean_over_chunks(objective, product, chunk_size, params, batch, vector):
    """The mean of a product that is itself the mean over the examples it is given."""
    inputs, targets, _ = require_batch(objective, params, batch)
    count = jax.tree.leaves(inputs)[0].shape[0]
    size = min(chunk_size, count)
    whole, left = divmod(count, size)

    def weighted(chunk, share):
        part = product(params, chunk, vector)
        return jax.tree.map(lambda x: x.astype(factor_dtype(x.dtype)) * share, part)

    def split(a):
        return a[: whole * size].reshape(whole, size, *a.shape[1:])

    start = jax.tree.map(
        lambda a: jnp.zeros(jnp.shape(a), factor_dtype(jnp.result_type(a))), params
    )
    total, _ = jax.lax.scan(
        lambda total, chunk: (jax.tree.map(jnp.add, total, weighted(chunk, size / count)), None),
        start,
        jax.tree.map(split, (inputs, targets)),
    )
    if left:
        tail = jax.tree.map(lambda a: a[whole * size :], (inputs, targets))
        total = jax.tree.map(jnp.add, total, weighted(tail, left / count))
    return jax.tree.map(lambda x, a: x.astype(jnp.result_type(a)), total, params)
