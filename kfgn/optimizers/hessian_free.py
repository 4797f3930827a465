"""Hessian-free optimization: conjugate gradients on the damped Gauss-Newton matrix.

The matrix is never formed. Its product with a vector, eq. (13), comes from the
callables that every `kfgn.Curvature` brings along, so no second forward pass is
made, and the matrix may be that of other examples than the gradient, or of
several micro-batches (`kfgn.average_curvature`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_not_negative, check_positive, in_order
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype, inner
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Named, Number, PyTree
from kfgn.curvature.batch import Curvature
from kfgn.objective.objective import Objective, require_objective
from kfgn.optimizers.conjugate_gradient import (
    Solution,
    check_stopping,
    conjugate_gradient,
    gauss_newton_product,
    wide,
)
from kfgn.optimizers.damping import Fixed, StepDamping, as_rule
from kfgn.optimizers.layer_blocks import NO_BLOCKS, LayerBlocks, require_curvature, require_settings
from kfgn.optimizers.preconditioner import (
    DIAGONALS,
    Preconditioner,
    check_preconditioner,
    diagonal_solve,
    diagonal_weights,
)
from kfgn.optimizers.presets import HESSIAN_FREE_PRESETS
from kfgn.optimizers.state import (
    all_finite,
    check_state,
    counter,
    keep_if,
    number,
    stay,
    zeros_like,
)
from kfgn.optimizers.wrappers import whole_params


class ScaleByConjugateGradientState(NamedTuple):
    """State of `scale_by_conjugate_gradient`."""

    count: Array  # type: ignore[assignment]  # updates made
    skipped: Array  # updates skipped, for numbers that were not finite
    damping: Array  # λ
    reduction_ratio: Array  # ρ, as last measured
    iterations: Array  # of the last solution
    residual: Array  # of the last solution, relative to the right side
    negative_curvature: Array  # whether the last solution met any
    previous: Named  # the last solution, or nothing without warm start


def scale_by_conjugate_gradient(
    objective: Objective,
    *,
    blocks: LayerBlocks | None = None,
    damping: Number | StepDamping = HESSIAN_FREE_PRESETS["cnn"]["damping"],
    tolerance: Number | None = 0.1,
    progress: Number | None = None,
    max_iterations: int = 250,
    warm_start: Number = 0.0,
    preconditioner: str | None = None,
    power: Number = 0.75,
    inverse: str = "factored",
) -> optax.GradientTransformationExtraArgs:
    """The solution of `(G + (λ + η) I) d = g`, a direction of ascent.

        updates, state = tx.update(grads, state, params, curvature=curvature)

    G is the Gauss-Newton matrix of the curvature's `model_examples` (all of the
    batch with None) and η the objective's l2. The defaults are the preset "cnn".

    Args:
      objective: the objective.
      blocks: what `kfgn.layers.find_blocks` returned, for preconditioner "kronecker".
      damping: λ. A rule, such as `kfgn.transforms.LevenbergMarquardt`, adapts it
        by the ratio of the change that the whole step makes to the objective of
        the curvature's batch and the change that `g'd + d'(G + η I)d / 2`
        predicts; a number is fixed.
      tolerance, progress, max_iterations: when the iteration stops, as in
        `conjugate_gradient`.
      warm_start: the iteration starts at so much of the last solution.
      preconditioner: None; "diagonal": `(diag(F) + (λ + η) I)^power` with the
        empirical Fisher's diagonal on `update(..., batch=batch)` (Martens
        2010); "gauss_newton_diagonal": `(diag(G) + (λ + η) I)^power` with the
        exact diagonal on that batch; "kronecker": `Q ⊗ G + (λ + η) I` of the
        curvature's factors.
      power: of the diagonal.
      inverse: of the Kronecker factors, "factored" or "eigen".

    Where λ adapts, a step to where the objective is not finite is refused and λ
    raised. A batch that is not finite changes nothing but the count of skipped
    ones.

    Within `optax.masked` and `optax.partition` G is that of the parameters in
    it; a diagonal is computed at all of them, `update(..., all_params=params)`.
    `optax.inject_hyperparams` needs `static_args=("objective", "max_iterations")`.

    Raises:
      OptionError: an option out of its range; in `update`, a curvature with another l2.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx = scale_by_conjugate_gradient(objective, damping=1.0)
    >>> (_, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> step, _ = tx.update(grads, tx.init(w), w, curvature=curvature)
    >>> round(float(step[0, 0]), 5)  # the gradient is 9, and so is G
    0.9
    """
    require_objective(objective)
    rule = as_rule("damping", damping, StepDamping, Fixed)
    check_positive("power", power)
    check_not_negative("warm_start", warm_start)
    if not in_order(warm_start, 1):
        raise OptionError(f"warm_start must be at most 1, found {warm_start!r}")
    check_stopping(tolerance, progress, max_iterations)
    check_preconditioner(preconditioner, blocks, rule, objective.l2)
    used = blocks if preconditioner == "kronecker" and blocks is not None else NO_BLOCKS
    kronecker = Preconditioner(used, inverse)
    stopping = {"tolerance": tolerance, "progress": progress, "max_iterations": max_iterations}
    solver = _Solver(objective.l2, rule, stopping, warm_start)

    def init(params: PyTree) -> ScaleByConjugateGradientState:
        return solver.init(named_leaves(params))

    def update(
        updates, state, params=None, *, curvature=None, batch=None, all_params=None, **extra
    ):
        del extra
        check_state(state, ScaleByConjugateGradientState)
        gradient = named_leaves(updates)
        curvature = require_curvature(curvature, used, gradient)
        require_settings(curvature, l2=objective.l2)
        if not gradient:  # all is masked out
            return updates, state
        at: Callable | None = None
        if preconditioner in DIAGONALS:
            name = f"preconditioner {preconditioner!r}"
            params = whole_params(name, params, batch, all_params)
            weights = diagonal_weights(preconditioner, objective, params, batch, gradient)
            at = functools.partial(diagonal_solve, weights=weights, power=power)
        elif preconditioner is not None:
            at = functools.partial(kronecker.at, curvature=curvature, leaves=gradient)
        step, state = solver.advance(state, gradient, curvature, at)
        return with_leaves(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Solver:
    l2: Number
    damping: StepDamping
    stopping: dict[str, Any]
    warm_start: Number

    @property
    def cold(self) -> bool:
        """Whether the iteration always starts at zero."""
        return isinstance(self.warm_start, (int, float)) and self.warm_start == 0

    def init(self, leaves: Named) -> ScaleByConjugateGradientState:
        zeros = {n: jnp.zeros(jnp.shape(x), wide(x)) for n, x in leaves.items()}
        return ScaleByConjugateGradientState(
            count=counter(),
            skipped=counter(),
            damping=number(self.damping.initial),
            reduction_ratio=number(1),
            iterations=counter(),
            residual=number(),
            negative_curvature=jnp.zeros((), bool),
            previous={} if self.cold else zeros,
        )

    def advance(
        self,
        state: ScaleByConjugateGradientState,
        gradient: Named,
        curvature: Curvature,
        at: Callable | None,
    ) -> tuple[Named, ScaleByConjugateGradientState]:
        if not self.damping.adapts:  # it may follow a schedule
            state = state._replace(damping=jnp.asarray(self.damping.initial, jnp.float32))
        right = {n: g.astype(wide(g)) for n, g in gradient.items()}
        solution = self.solve(state, right, curvature, at)
        usable = all_finite((gradient, curvature.value, curvature.gradient, solution.x))
        ratio, damping, reached = self.adapt(state, curvature, solution)
        step = {n: x.astype(gradient[n].dtype) for n, x in solution.x.items()}
        moved = state._replace(
            count=state.count + 1,
            damping=damping,
            reduction_ratio=ratio,
            iterations=solution.iterations,
            residual=solution.residual.astype(jnp.float32),
            negative_curvature=solution.negative_curvature,
            previous={} if self.cold else solution.x,
        )
        zeros, kept = stay(step, state)
        refused = kept._replace(damping=damping, previous=zeros_like(state.previous))
        kept = keep_if(usable, refused, kept)
        return keep_if(usable & reached, (step, moved), (zeros, kept))

    def solve(self, state, right: Named, curvature: Curvature, at: Callable | None) -> Solution:
        """The solution, preconditioned by `at(λ + η): r -> M^-1 r`."""

        def product(v: Named) -> Named:
            curved = gauss_newton_product(curvature, v)
            return {n: curved[n].astype(x.dtype) + shift(x.dtype) * x for n, x in v.items()}

        def shift(dtype) -> Array:  # at the precision of what is solved
            return state.damping.astype(dtype) + jnp.asarray(self.l2).astype(dtype)

        total = shift(factor_dtype(*(x.dtype for x in right.values())))
        start = None
        if not self.cold:
            part = jnp.asarray(self.warm_start)
            start = jax.tree.map(lambda x: part.astype(x.dtype) * x, state.previous)
        return conjugate_gradient(
            product,
            right,
            start=start,
            precondition=None if at is None else at(total),
            **self.stopping,
        )

    def adapt(self, state, curvature: Curvature, solution: Solution) -> tuple[Array, Array, Array]:
        """ρ, λ, and whether the objective is finite where the step leads."""
        if not self.damping.adapts:
            return state.reduction_ratio, state.damping, jnp.array(True)
        x = solution.x
        after = curvature.displaced(jax.tree.map(jnp.negative, x))
        curved = inner(x, solution.product) - state.damping.astype(wide(after)) * inner(x, x)
        slope = inner(x, {n: curvature.gradient[n] for n in x})
        ratio = ((after - curvature.value) / (0.5 * curved - slope)).astype(jnp.float32)
        damping = self.damping.adapted(state.damping, ratio)
        due = self.damping.due(state.count + 1) | ~jnp.isfinite(after)
        return ratio, jnp.where(due, damping, state.damping), jnp.isfinite(after)
