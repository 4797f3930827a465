"""Hessian-free optimization: conjugate gradients on the damped Gauss-Newton matrix.

The matrix is never formed. Its product with a vector, eq. (13), comes from the
callables that every `kfgn.Curvature` brings along, so no second forward pass is
made, and the matrix may be that of other examples than the gradient, or of
several micro-batches (`kfgn.average_curvature`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_not_negative, check_pair, check_positive, in_order
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype, inner
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.batch import Curvature
from kfgn.objective.objective import Objective
from kfgn.optimizers.cg_preconditioner import (
    DIAGONALS,
    check_preconditioner,
    diagonal_solve,
    diagonal_weights,
    kronecker_solve,
)
from kfgn.optimizers.conjugate_gradient import (
    Solution,
    check_stopping,
    conjugate_gradient,
    gauss_newton_product,
    wide,
)
from kfgn.optimizers.damping import Damping, check_damping, levenberg_marquardt
from kfgn.optimizers.layer_blocks import LayerBlocks, require_curvature
from kfgn.optimizers.preconditioner import Preconditioner, all_finite
from kfgn.optimizers.transforms import check_state, keep_if
from kfgn.optimizers.wrappers import whole_params

Array = jax.Array
Named = dict[str, Any]

#: Settings for `scale_by_conjugate_gradient(objective, **settings)`: "cnn" of the code that
#: belongs to the lecture on Newton methods for convolutional networks, "martens" of Martens (2010).
HESSIAN_FREE_PRESETS: dict[str, dict[str, Any]] = {
    "cnn": {
        "damping": Damping(1.0, 1e-10, 1e10, period=1, decay=2 / 3),
        "thresholds": (0.25, 0.75),
        "tolerance": 0.1,
        "max_iterations": 250,
    },
    "martens": {
        "damping": Damping(45.0, 1e-10, 1e10, period=1, decay=2 / 3),
        "thresholds": (0.25, 0.75),
        "tolerance": None,
        "progress": 5e-4,
        "max_iterations": 250,
        "warm_start": 0.95,
        "preconditioner": "diagonal",
    },
}


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
    layers: LayerBlocks | None = None,
    damping: Any = HESSIAN_FREE_PRESETS["cnn"]["damping"],
    thresholds: tuple[float, float] = (0.25, 0.75),
    tolerance: Any = 0.1,
    progress: Any = None,
    max_iterations: int = 250,
    warm_start: Any = 0.0,
    preconditioner: str | None = None,
    power: Any = 0.75,
    inverse: str = "factored",
) -> optax.GradientTransformationExtraArgs:
    """The solution of `(G + (λ + η) I) d = g`, a direction of ascent.

        updates, state = tx.update(grads, state, params, curvature=curvature)

    G is the Gauss-Newton matrix of the curvature's `model_examples` (all of the
    batch with None) and η the objective's l2. The defaults are the preset "cnn".

    Args:
      objective: the objective.
      layers: what `kfgn.layers.find_blocks` returned, for preconditioner "kronecker".
      damping: λ. A `kfgn.transforms.Damping` adapts by the ratio of the change that the
        whole step makes to the objective of the curvature's batch and the
        change that `g'd + d'(G + η I)d / 2` predicts; a number is fixed.
      thresholds: λ falls where the ratio is above the second, rises below the first.
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
      OptionError: an option out of its range.
    """
    if not isinstance(objective, Objective):
        raise OptionError(f"objective must be a kfgn.Objective, found a {type(objective).__name__}")
    low, high = check_pair("thresholds", thresholds)
    check_positive("power", power)
    _check_options(damping, warm_start)
    check_preconditioner(preconditioner, layers, damping, objective.l2)
    kronecker = preconditioner == "kronecker"
    blocks = layers if kronecker and layers is not None else _NO_BLOCKS
    solver = _Solver(
        objective,
        damping,
        (low, high),
        {"tolerance": tolerance, "progress": progress, "max_iterations": max_iterations},
        warm_start,
        power,
        Preconditioner(blocks, inverse) if kronecker else None,
    )
    check_stopping(**solver.stopping)

    def init(params):
        return solver.init(named_leaves(params))

    def update(
        updates, state, params=None, *, curvature=None, batch=None, all_params=None, **extra
    ):
        del extra
        check_state(state, ScaleByConjugateGradientState)
        gradient = named_leaves(updates)
        curvature = require_curvature(curvature, blocks, gradient)
        if not gradient:  # all is masked out
            return updates, state
        weights = None
        if preconditioner in DIAGONALS:
            name = f"preconditioner {preconditioner!r}"
            params = whole_params(name, params, batch, all_params)
            weights = diagonal_weights(preconditioner, objective, params, batch, gradient)
        step, state = solver.advance(state, gradient, curvature, weights)
        return with_leaves(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Solver:
    objective: Objective
    damping: Any  # a Damping, or a number
    thresholds: tuple[Any, Any]
    stopping: dict[str, Any]
    warm_start: Any
    power: Any
    kronecker: Preconditioner | None

    @property
    def cold(self) -> bool:
        """Whether the iteration always starts at zero."""
        return isinstance(self.warm_start, (int, float)) and self.warm_start == 0

    def init(self, leaves: Named) -> ScaleByConjugateGradientState:
        adapts = isinstance(self.damping, Damping)
        damping = self.damping.initial if adapts else self.damping
        zeros = {n: jnp.zeros(jnp.shape(x), wide(x)) for n, x in leaves.items()}
        return ScaleByConjugateGradientState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            damping=jnp.array(damping, jnp.float32),
            reduction_ratio=jnp.ones((), jnp.float32),
            iterations=jnp.zeros((), jnp.int32),
            residual=jnp.zeros((), jnp.float32),
            negative_curvature=jnp.zeros((), bool),
            previous={} if self.cold else zeros,
        )

    def advance(
        self,
        state: ScaleByConjugateGradientState,
        gradient: Named,
        curvature: Curvature,
        weights: Named | None,
    ) -> tuple[Named, ScaleByConjugateGradientState]:
        if not isinstance(self.damping, Damping):  # it may follow a schedule
            state = state._replace(damping=jnp.asarray(self.damping, jnp.float32))
        right = {n: g.astype(wide(g)) for n, g in gradient.items()}
        solution = self.solve(state, right, curvature, weights)
        usable = all_finite((gradient, curvature.value, curvature.gradient, solution.x))
        ratio, damping, reached = self.adapt(state, curvature, solution)
        step = {n: x.astype(gradient[n].dtype) for n, x in solution.x.items()}
        zeros = jax.tree.map(jnp.zeros_like, (step, state.previous))
        moved = state._replace(
            count=state.count + 1,
            damping=damping,
            reduction_ratio=ratio,
            iterations=solution.iterations,
            residual=solution.residual.astype(jnp.float32),
            negative_curvature=solution.negative_curvature,
            previous={} if self.cold else solution.x,
        )
        stay = state._replace(skipped=state.skipped + 1)
        refused = stay._replace(damping=damping, previous=zeros[1])
        state = keep_if(usable & reached, moved, keep_if(usable, refused, stay))
        return keep_if(usable & reached, step, zeros[0]), state

    def solve(self, state, right: Named, curvature: Curvature, weights: Named | None) -> Solution:
        def product(v: Named) -> Named:
            curved = gauss_newton_product(curvature, v)
            return {n: curved[n].astype(x.dtype) + shift(x.dtype) * x for n, x in v.items()}

        def shift(dtype) -> Array:  # at the precision of what is solved
            return state.damping.astype(dtype) + jnp.asarray(self.objective.l2).astype(dtype)

        total = shift(factor_dtype(*(x.dtype for x in right.values())))
        start = None
        if not self.cold:
            part = jnp.asarray(self.warm_start)
            start = jax.tree.map(lambda x: part.astype(x.dtype) * x, state.previous)
        return conjugate_gradient(
            product,
            right,
            start=start,
            precondition=self.preconditioned(total, right, curvature, weights),
            **self.stopping,
        )

    def preconditioned(self, total, right, curvature, weights) -> Callable | None:
        """`r -> M^-1 r`, or None."""
        if self.kronecker is not None:
            return kronecker_solve(self.kronecker, curvature, total, right)
        if weights is None:
            return None
        return diagonal_solve(weights, total, self.power)

    def adapt(self, state, curvature: Curvature, solution: Solution) -> tuple[Array, Array, Array]:
        """ρ, λ, and whether the objective is finite where the step leads."""
        if not isinstance(self.damping, Damping):
            return state.reduction_ratio, state.damping, jnp.array(True)
        x = solution.x
        after = curvature.displaced(jax.tree.map(jnp.negative, x))
        curved = inner(x, solution.product) - state.damping.astype(wide(after)) * inner(x, x)
        slope = inner(x, {n: curvature.gradient[n] for n in x})
        ratio = ((after - curvature.value) / (0.5 * curved - slope)).astype(jnp.float32)
        damping = levenberg_marquardt(self.damping, state.damping, ratio, *self.thresholds)
        due = self.damping.due(state.count + 1) | ~jnp.isfinite(after)
        return ratio, jnp.where(due, damping, state.damping), jnp.isfinite(after)


def _check_options(damping: Any, warm_start: Any) -> None:
    if isinstance(damping, Damping):
        check_damping("damping", damping)
    else:
        check_not_negative("damping", damping)
    check_not_negative("warm_start", warm_start)
    if not in_order(warm_start, 1):
        raise OptionError(f"warm_start must be at most 1, found {warm_start!r}")


_NO_BLOCKS = LayerBlocks({}, (), {})
