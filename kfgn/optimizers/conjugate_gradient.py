"""Conjugate gradients, and what they need to solve with a Gauss-Newton matrix.

`jax.scipy.sparse.linalg.cg` stops by the residual alone and reports neither
iterations nor negative curvature; the loop here can stop by the progress of
the quadratic model (Martens 2010, section 4.4), too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_not_negative, check_positive, check_whole
from kfgn.base.linalg import factor_dtype, inner
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, Named, Number, PyTree, Scalar
from kfgn.curvature.blocks import blocks_of
from kfgn.curvature.operators import gauss_newton
from kfgn.model.graph.unite import unite
from kfgn.objective.sum_of import AnyObjective
from kfgn.optimizers.state import Count, Flag

Operator: TypeAlias = Callable[[PyTree], PyTree]


class Solution(NamedTuple):
    """What `conjugate_gradient` found for `A x = b`.

    >>> found = conjugate_gradient(lambda v: 2 * v, jnp.ones(3))
    >>> found.x.tolist(), int(found.iterations), bool(found.negative_curvature)
    ([0.5, 0.5, 0.5], 1, False)
    """

    x: PyTree
    product: PyTree  # A x
    iterations: Count  # products with A, less the one of a start
    residual: Scalar  # |b - A x| / |b|
    value: Scalar  # the quadratic model x'Ax / 2 - b'x
    negative_curvature: Flag  # whether a direction with p'Ap <= 0 was met


class _Iterate(NamedTuple):
    count: Count  # type: ignore[assignment]
    x: PyTree
    residual: PyTree  # r
    direction: PyTree  # p
    rho: Scalar  # r'M^-1 r
    values: Float[Array, " iterations"]  # of the model
    negative: Flag


def conjugate_gradient(
    product: Operator,
    b: PyTree,
    *,
    start: PyTree | None = None,
    precondition: Operator | None = None,
    tolerance: Number | None = 0.1,
    progress: Number | None = None,
    max_iterations: int = 250,
) -> Solution:
    """Solves `A x = b` for a positive definite A, to the first rule that says stop.

    Where `p'Ap` is not positive, the solution so far is returned and
    `negative_curvature` says so; at the first iteration it is `M^-1 b`, along
    which the model falls.

    Args:
      product: `v -> A v`, of pytrees like b.
      b: the right side, a pytree of arrays.
      start: where to start; None for zero.
      precondition: `r -> M^-1 r`, M positive definite and close to A; None for I.
      tolerance: stop where `|b - A x| <= tolerance |b|`; None for never.
      progress: ε; stop where over the last `k = max(10, i / 10)` iterations the
        model's value fell by less than `k ε` of itself; None for never.
      max_iterations: stop there in any case.

    Returns:
      The solution, and what is known of it.

    Raises:
      OptionError: an option out of its range.

    >>> import jax.numpy as jnp
    >>> found = conjugate_gradient(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2), tolerance=1e-5)
    >>> [round(float(x), 5) for x in found.x], int(found.iterations)
    ([1.0, 0.5], 2)
    """
    check_stopping(tolerance, progress, max_iterations)
    precondition = precondition or (lambda r: r)
    least = 0.0 if tolerance is None else tolerance
    limit = jnp.asarray(least).astype(inner(b, b).dtype) ** 2 * inner(b, b)

    def model(x: PyTree, residual: PyTree) -> Scalar:
        return -0.5 * (inner(x, residual) + inner(x, b))

    def go_on(s: _Iterate) -> Flag:
        left = s.count < max_iterations
        running = left & ~s.negative & (inner(s.residual, s.residual) > limit)
        return running if progress is None else running & ~_stalled(s, progress)

    def turn(s: _Iterate) -> _Iterate:
        image = product(s.direction)
        bend = inner(s.direction, image)
        positive = bend > 0
        step = jnp.where(positive, s.rho / jnp.where(positive, bend, 1), 0)
        x, residual = _add(s.x, step, s.direction), _add(s.residual, -step, image)
        steepest = precondition(residual)
        rho = inner(residual, steepest)
        count = s.count + positive.astype(s.count.dtype)
        direction = _add(steepest, rho / s.rho, s.direction)
        values = s.values.at[count].set(model(x, residual))
        return _Iterate(count, x, residual, direction, rho, values, ~positive)

    first = steepest = precondition(b)
    x, residual = jax.tree.map(jnp.zeros_like, b), b
    if start is not None:
        x, residual = start, jax.tree.map(jnp.subtract, b, product(start))
        steepest = precondition(residual)
    value = model(x, residual)
    values = jnp.zeros((max_iterations + 1,), value.dtype).at[0].set(value)
    rho, no = inner(residual, steepest), jnp.zeros((), bool)
    begin = _Iterate(jnp.zeros((), jnp.int32), x, residual, steepest, rho, values, no)
    return _finish(product, b, first, jax.lax.while_loop(go_on, turn, begin))


def _finish(product: Operator, b: PyTree, first: PyTree, found: _Iterate) -> Solution:
    image = jax.tree.map(jnp.subtract, b, found.residual)
    early = found.negative & (found.count == 0)
    x, image = jax.lax.cond(early, lambda: (first, product(first)), lambda: (found.x, image))
    residual = jax.tree.map(jnp.subtract, b, image)
    norm = inner(b, b)
    relative = jnp.sqrt(inner(residual, residual) / jnp.where(norm == 0, 1, norm))
    value = 0.5 * inner(x, image) - inner(x, b)
    return Solution(x, image, found.count, relative, value, found.negative)


def _stalled(s: _Iterate, progress: Number) -> Flag:
    """Whether the model fell too little over the last k iterations."""
    k = jnp.maximum(10, s.count // 10)
    now, before = s.values[s.count], s.values[jnp.maximum(s.count - k, 0)]
    least = k.astype(now.dtype) * jnp.asarray(progress).astype(now.dtype)
    return (s.count > k) & (now < 0) & (before - now < -now * least)


def _add(x: PyTree, factor: Scalar, y: PyTree) -> PyTree:
    """`x + factor y`, in the dtype of x."""
    return jax.tree.map(lambda a, b: a + factor.astype(a.dtype) * b.astype(a.dtype), x, y)


def check_stopping(tolerance: Any, progress: Any, max_iterations: Any) -> None:
    """Raises OptionError for a rule of `conjugate_gradient` that makes no sense."""
    if tolerance is not None:
        check_not_negative("tolerance", tolerance)
    if progress is not None:
        check_positive("progress", progress)
    check_whole("max_iterations", max_iterations, 1)  # the size of an array


def block_gauss_newton_direction(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    gradient: PyTree,
    damping: Number = 0.0,
    *,
    tolerance: Number | None = 1e-6,
    max_iterations: int = 250,
) -> tuple[PyTree, dict[str, Scalar]]:
    """`(G_b + (damping + l2) I)^-1 g_b` for the exact Gauss-Newton block of every layer b.

    The direction that Botev et al. compare their approximations with (appendix
    G.2). Blocks are those of `kfgn.gauss_newton(objective).blocks`, cross terms
    of tied uses included; a parameter in no layer is a block of its own.

    Args:
      objective, params, batch: as everywhere.
      gradient: g, a pytree like params.
      damping: added to the blocks, beside the objective's l2.
      tolerance, max_iterations: as in `conjugate_gradient`.

    Returns:
      The direction, a pytree like params, and by block the relative residual
      that is left.

    Raises:
      OptionError: an option out of its range.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> g = jax.grad(objective)(w, batch)
    >>> direction, _ = block_gauss_newton_direction(objective, w, batch, g, damping=1.0)
    >>> round(float(direction[0, 0]), 5)  # the gradient is 9, and so is G
    0.9
    """
    check_not_negative("damping", damping)
    blocks = blocks_of(unite(objective, params, batch))
    leaves = named_leaves(gradient)
    found: Named = {}
    residuals: dict[str, Scalar] = {}
    for name, matvec in gauss_newton(objective).block_matvecs(params, batch).items():
        g = blocks[name].to_matrix(leaves)

        def product(v: Array, matvec: Any = matvec, dtype: Any = g.dtype) -> Array:
            shift = jnp.asarray(damping + objective.l2).astype(v.dtype)
            return matvec(v.astype(dtype)).astype(v.dtype) + shift * v

        solution = conjugate_gradient(
            product, g.astype(wide(g)), tolerance=tolerance, max_iterations=max_iterations
        )
        found |= blocks[name].from_matrix(solution.x)
        residuals[name] = solution.residual
    found = {n: x.astype(leaves[n].dtype) for n, x in found.items()}
    return with_leaves(gradient, found), residuals


def wide(x: Any) -> Any:
    """The dtype that a leaf is solved for in, at least float32."""
    return factor_dtype(jnp.result_type(x))
