"""Newton's method with the exact Hessian, whole or by blocks, for small problems.

The Hessian is indefinite away from a minimum. It is taken apart into
eigenvalues and used as `V (|Λ| + τ I) V'`: the damped Hessian wherever it is
positive semi-definite, and else a matrix whose steps go down along directions
of negative curvature too, where Newton's own would climb to the saddle point.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from kfgn.base.checks import check_choice, check_not_negative
from kfgn.base.decompositions import eigh
from kfgn.base.errors import ParameterError
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, Named, Number, PyTree, Scalar, Shape
from kfgn.curvature.operators import hessian
from kfgn.objective.sum_of import AnyObjective, require_objective
from kfgn.optimizers.layer_blocks import find_blocks
from kfgn.optimizers.skipped import SkippedStreak, count_streak, no_streak
from kfgn.optimizers.state import Count, all_finite, check_state, counter, guarded, number
from kfgn.optimizers.wrappers import has_masked, whole_params

STRUCTURES = ("full", "block")


class Solved(NamedTuple):
    """A Newton direction, and how the Hessian was bent."""

    direction: PyTree  # like params
    smallest: Scalar  # the smallest eigenvalue, l2 included
    negative: Count  # how many eigenvalues are below zero


def newton_direction(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    gradient: PyTree,
    *,
    damping: Number = 0.0,
    structure: str = "full",
) -> Solved:
    """`V (|Λ| + τ I)^-1 V' g` of the Hessian `V Λ V'` of the objective on a batch.

    Eigenvalues that are zero up to roundoff, where τ is zero as well, are left
    out: the solution of least norm.

    Args:
      objective: the objective; its l2 is in the Hessian.
      params: P parameters.
      batch: `(inputs, targets)`.
      gradient: g, a pytree like params; what `optax.masked` left out of it
        stays fixed, and has no part in the Hessian.
      damping: τ.
      structure: "full": one matrix `[P, P]`. "block": one for every layer, by
        `kfgn.hessian(objective).blocks`, and for every parameter in none.

    Returns:
      The direction, and how far the Hessian was from positive definite.

    Raises:
      OptionError: an unknown structure, or a negative damping.
      ParameterError: the gradient is not like params, or, by blocks, lacks a
        part of a layer.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> g = jax.grad(objective)(w, batch)
    >>> float(newton_direction(objective, w, batch, g).direction[0, 0])  # from 1 to 0
    1.0
    """
    _check_options(objective, damping, structure)
    _check_like(gradient, params)
    leaves = named_leaves(gradient)
    split = _whole if structure == "full" else _by_layer
    solve = jax.vmap(_solve, (0, 0, None))
    found: Named = {}
    spectra = []
    for part in split(objective, params, batch, leaves):
        solution, *spectrum = solve(part.matrices, part.vectors, damping)
        found |= part.back(solution.reshape(part.shape))
        spectra.append(spectrum)
    smallest, negative = (jnp.concatenate(x) for x in zip(*spectra, strict=True))
    direction = {n: x.astype(leaves[n].dtype) for n, x in found.items()}
    return Solved(with_leaves(gradient, direction), jnp.min(smallest), jnp.sum(negative))


class _Part(NamedTuple):
    """Some parameters, whose Hessian is a stack of blocks."""

    matrices: Float[Array, "S P P"]  # l2 included
    vectors: Float[Array, "S P"]  # their gradient
    shape: Shape  # of what `back` takes
    back: Callable[[Array], Named]


def _whole(
    objective: AnyObjective, params: PyTree, batch: Batch, gradient: Named
) -> Iterator[_Part]:
    def of_own(model: Any) -> Any:
        return lambda own, inputs: model(with_leaves(params, own), inputs)

    own = {n: x for n, x in named_leaves(params).items() if n in gradient}
    matrix = hessian(objective.with_model(of_own)).dense(own, batch, with_l2=True)
    vector, back = ravel_pytree({n: jnp.asarray(g, matrix.dtype) for n, g in gradient.items()})
    yield _Part(matrix[None], vector[None], vector.shape, back)


def _by_layer(
    objective: AnyObjective, params: PyTree, batch: Batch, gradient: Named
) -> Iterator[_Part]:
    # Its blocks are exact ones: what factors would take is no matter.
    found = find_blocks(objective, params, batch, unassigned="diagonal", factor_limit=2**62)
    present = found.present(gradient)
    blocks = hessian(objective).blocks(params, batch)
    for name, part in present.items():
        own = part.to_matrix(gradient)
        vectors = own.reshape(part.kernels, -1)
        identity = jnp.eye(vectors.shape[1], dtype=blocks[name].dtype)
        matrices = blocks[name].reshape(-1, *identity.shape) + objective.l2 * identity
        yield _Part(matrices, vectors, own.shape, part.from_matrix)


def _solve(
    matrix: Float[Array, "P P"], vector: Float[Array, " P"], damping: Number
) -> tuple[Float[Array, " P"], Scalar, Count]:
    """The solution, the smallest eigenvalue, and the number below zero."""
    values, vectors = eigh(matrix)
    size = jnp.abs(values)
    roundoff = len(values) * jnp.finfo(values.dtype).eps * jnp.max(size)
    size = size + jnp.asarray(damping).astype(size.dtype)
    used = size > roundoff
    inverse = jnp.where(used, 1 / jnp.where(used, size, 1), 0)
    solution = vectors @ (inverse * (vectors.T @ vector.astype(values.dtype)))
    return solution, values[0], jnp.sum(values < -roundoff)


class ScaleByNewtonState(NamedTuple):
    """State of `scale_by_newton`."""

    count: Count  # type: ignore[assignment]  # updates made
    skipped: Count  # updates skipped, for numbers that were not finite
    streak: SkippedStreak  # of those, in a row up to now
    smallest: Scalar  # the Hessian's smallest eigenvalue, as last seen
    negative: Count  # how many of its eigenvalues were negative


def scale_by_newton(
    objective: AnyObjective, *, damping: Number = 0.0, structure: str = "full"
) -> optax.GradientTransformationExtraArgs:
    """The direction of `newton_direction` as an optax transformation.

        updates, state = tx.update(grads, state, params, batch=batch)

    It returns a direction of ascent, whose sign belongs to
    `optax.scale_by_learning_rate`. In a chain with one of optax's line searches
    give the search `value_fn=objective`, which takes `batch` as well. A batch
    whose numbers are not finite changes nothing but the count of skipped ones.

    Within `optax.masked` and `optax.partition` the Hessian is that of the
    parameters in it, by blocks whole layers, and `update` needs all of them as
    `all_params=params`. `optax.inject_hyperparams` needs `static_args="objective"`.

    Args:
      objective, damping, structure: as for `newton_direction`.

    Raises:
      OptionError: as `newton_direction`; in `update`, also without params or batch.
      ParameterError: in `update`, params are masked out and `all_params` is missing.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx, g = scale_by_newton(objective, damping=9.0), jax.grad(objective)(w, batch)
    >>> step, state = tx.update(g, tx.init(w), w, batch=batch)
    >>> float(step[0, 0]), float(state.smallest)
    (0.5, 9.0)
    """
    _check_options(objective, damping, structure)

    def init(params: PyTree) -> ScaleByNewtonState:
        del params
        return ScaleByNewtonState(counter(), counter(), no_streak(), number(), counter())

    def update(
        updates: PyTree,
        state: ScaleByNewtonState,
        params: PyTree = None,
        *,
        batch: Batch = None,
        all_params: PyTree = None,
        **_: Any,
    ) -> tuple[PyTree, ScaleByNewtonState]:
        check_state(state, ScaleByNewtonState)
        everything = whole_params("scale_by_newton", params, batch, all_params)
        if not jax.tree.leaves(updates):  # all is masked out
            return updates, state
        solved = newton_direction(
            objective, everything, batch, updates, damping=damping, structure=structure
        )
        moved = state._replace(
            count=state.count + 1,
            smallest=solved.smallest.astype(jnp.float32),
            negative=solved.negative.astype(jnp.int32),
        )
        good = all_finite((updates, solved.direction, solved.smallest))
        step, moved = guarded(good, solved.direction, moved, state)
        return step, count_streak(state, moved)

    return optax.GradientTransformationExtraArgs(init, update)


def newton(
    objective: AnyObjective,
    learning_rate: Number | optax.Schedule = 1.0,
    *,
    damping: Number = 0.0,
    structure: str = "full",
) -> optax.GradientTransformationExtraArgs:
    """Newton's method: `scale_by_newton`, then a step of `-learning_rate` (or a schedule).

    Args:
      objective, damping, structure: as for `newton_direction`.
      learning_rate: a factor or an optax schedule.

    Raises:
      OptionError: as `scale_by_newton`.

    >>> import jax, jax.numpy as jnp, kfgn, optax
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx, g = newton(objective), jax.grad(objective)(w, batch)
    >>> step, _ = tx.update(g, tx.init(w), w, batch=batch)
    >>> float(optax.apply_updates(w, step)[0, 0])
    0.0
    """
    return optax.chain(
        scale_by_newton(objective, damping=damping, structure=structure),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check_options(objective: Any, damping: Any, structure: str) -> None:
    require_objective(objective)
    check_not_negative("damping", damping)
    check_choice("structure", structure, STRUCTURES)


def _check_like(gradient: PyTree, params: PyTree) -> None:
    found, expected = (
        {n: jnp.shape(leaf) for n, leaf in named_leaves(tree).items()}
        for tree in (gradient, params)
    )
    if has_masked(gradient):
        expected = {n: shape for n, shape in expected.items() if n in found}
    if found != expected:
        raise ParameterError(
            f"the gradient must be like params, of shapes {expected}; found {found}"
        )
