"""Hessian-free optimization: conjugate gradients on the damped Gauss-Newton matrix.

The matrix is never formed. Its product with a vector, eq. (13), comes from the
callables that every `kfgn.Curvature` brings along, so no second forward pass is
made, and the matrix may be that of other examples than the gradient, or of
several micro-batches (`kfgn.average_curvature`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfgn.base.checks import check_choice, check_not_negative, check_positive, in_order, is_zero
from kfgn.base.devices import mean_over_devices, varying_axes
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.linalg import factor_dtype, inner
from kfgn.base.trees import named_leaves
from kfgn.base.types import Batch, Named, Number, PyTree, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.curvature.operators import empirical_fisher, gauss_newton
from kfgn.objective.sum_of import AnyObjective, require_objective
from kfgn.optimizers.conjugate_gradient import Solution, check_stopping, conjugate_gradient, wide
from kfgn.optimizers.damping import Fixed, StepDamping, as_rule
from kfgn.optimizers.layer_blocks import NO_BLOCKS, LayerBlocks
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.presets import HESSIAN_FREE_PRESETS
from kfgn.optimizers.skipped import SkippedStreak, no_streak
from kfgn.optimizers.state import Count, Flag, counter, is_usable, keep_if, number, stay, zeros_like
from kfgn.optimizers.wrappers import by_curvature, whole_params

PRECONDITIONERS = (None, "diagonal", "gauss_newton_diagonal", "kronecker")


class ScaleByConjugateGradientState(NamedTuple):
    """State of `scale_by_conjugate_gradient`."""

    count: Count  # type: ignore[assignment]  # updates made
    skipped: Count  # updates skipped, for numbers that were not finite
    streak: SkippedStreak  # of those, in a row up to now
    damping: Scalar  # λ
    reduction_ratio: Scalar  # ρ, as last measured
    iterations: Count  # of the last solution
    residual: Scalar  # of the last solution, relative to the right side
    negative_curvature: Flag  # whether the last solution met any
    previous: Named  # the last solution, or nothing without warm start


def scale_by_conjugate_gradient(
    objective: AnyObjective,
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
        exact diagonal on that batch, with power 1 the solution itself where G is
        diagonal; "kronecker": `Q ⊗ G + (λ + η) I` of the curvature's factors.
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
    check_choice("preconditioner", preconditioner, PRECONDITIONERS)
    if preconditioner == "kronecker" and blocks is None:
        raise OptionError(
            'preconditioner "kronecker" needs '
            "blocks=kfgn.layers.find_blocks(objective, params, batch)"
        )
    if preconditioner is not None and is_zero(rule.least) and is_zero(objective.l2):
        raise OptionError(
            f"preconditioner {preconditioner!r} needs a positive damping, or l2: what it inverts "
            f"may be singular; found {rule!r}"
        )
    used = blocks if preconditioner == "kronecker" and blocks is not None else NO_BLOCKS
    kronecker = Preconditioner(used, inverse)
    cold = is_zero(warm_start)

    def init(leaves: Named) -> ScaleByConjugateGradientState:
        zeros = {n: jnp.zeros(jnp.shape(x), wide(x)) for n, x in leaves.items()}
        return ScaleByConjugateGradientState(
            count=counter(),
            skipped=counter(),
            streak=no_streak(),
            damping=number(rule.initial),
            reduction_ratio=number(1),
            iterations=counter(),
            residual=number(),
            negative_curvature=jnp.zeros((), bool),
            previous={} if cold else zeros,
        )

    def inverse_at(
        total: Scalar,
        gradient: Named,
        curvature: Curvature,
        *,
        params: PyTree = None,
        batch: Batch = None,
        all_params: PyTree = None,
        **_: Any,
    ) -> Callable[[Named], Named] | None:
        if preconditioner is None:
            return None
        if preconditioner == "kronecker":
            return kronecker.at(total, curvature, gradient)
        params = whole_params(f"preconditioner {preconditioner!r}", params, batch, all_params)
        operator = empirical_fisher if preconditioner == "diagonal" else gauss_newton
        weights = named_leaves(operator(objective).diagonal_by_parameter(params, batch))
        if missing := [n for n in gradient if n not in weights]:
            raise ParameterError(
                f"params lack {', '.join(map(repr, missing))}, found {list(weights)}"
            )
        return diagonal_solve(total, {n: weights[n] for n in gradient}, power)

    def advance(
        state: ScaleByConjugateGradientState, gradient: Named, curvature: Curvature, **given: Any
    ) -> tuple[Named, ScaleByConjugateGradientState]:
        if not gradient:  # all is masked out
            return gradient, state
        if not rule.adapts:  # it may follow a schedule
            state = state._replace(damping=jnp.asarray(rule.initial, jnp.float32))

        def total(dtype: Any) -> Scalar:  # λ + η, at the precision of what is solved
            return state.damping.astype(dtype) + jnp.asarray(objective.l2).astype(dtype)

        def product(v: Named) -> Named:
            curved = gauss_newton_product(curvature, v)
            return {n: curved[n].astype(x.dtype) + total(x.dtype) * x for n, x in v.items()}

        right = {n: g.astype(wide(g)) for n, g in gradient.items()}
        damping = total(factor_dtype(*(x.dtype for x in right.values())))
        part = jnp.asarray(warm_start)
        warm = jax.tree.map(lambda x: part.astype(x.dtype) * x, state.previous)
        solution = conjugate_gradient(
            product,
            right,
            start=None if cold else warm,
            precondition=inverse_at(damping, gradient, curvature, **given),
            tolerance=tolerance,
            progress=progress,
            max_iterations=max_iterations,
        )
        read = (gradient, curvature.value, curvature.gradient, solution.x)
        usable = is_usable(curvature, read)
        ratio, damping, reached = _adapted(rule, state, curvature, solution)
        step = {n: x.astype(gradient[n].dtype) for n, x in solution.x.items()}
        moved = state._replace(
            count=state.count + 1,
            damping=damping,
            reduction_ratio=ratio,
            iterations=solution.iterations,
            residual=solution.residual.astype(jnp.float32),
            negative_curvature=solution.negative_curvature,
            previous={} if cold else solution.x,
        )
        zeros, kept = stay(step, state)
        refused = kept._replace(damping=damping, previous=zeros_like(state.previous))
        kept = keep_if(usable, refused, kept)
        return keep_if(usable & reached, (step, moved), (zeros, kept))

    return by_curvature(ScaleByConjugateGradientState, used, init, advance, l2=objective.l2)


def diagonal_solve(damping: Scalar, weights: Named, power: Number) -> Callable[[Named], Named]:
    """`r -> (diag(weights) + damping I)^-power r`."""
    scales = {
        n: (w + damping.astype(w.dtype)) ** jnp.asarray(power).astype(w.dtype)
        for n, w in weights.items()
    }
    return lambda r: {n: x / scales[n].astype(x.dtype) for n, x in r.items()}


def gauss_newton_product(curvature: Curvature, vector: Named) -> Named:
    """`J'HJ v` of a curvature's batch, without l2, for a direction by parameter name."""
    pushed, pull = jax.vjp(curvature.linearized, vector)
    curved = jax.grad(lambda u: curvature.output_product(u, pushed))(jnp.zeros_like(pushed))
    product = pull(curved.astype(pushed.dtype))[0]
    if varying_axes(curvature.linearized):  # JAX has summed over the devices
        return product
    quadratic: Any = curvature.output_product.func
    return mean_over_devices(product, quadratic.axis_name)


def _adapted(
    rule: StepDamping, state: ScaleByConjugateGradientState, curvature: Curvature, found: Solution
) -> tuple[Scalar, Scalar, Flag]:
    """ρ, λ, and whether the objective is finite where the step leads."""
    if not rule.adapts:
        return state.reduction_ratio, state.damping, jnp.array(True)
    x = found.x
    after = curvature.displaced(jax.tree.map(jnp.negative, x))
    curved = inner(x, found.product) - state.damping.astype(wide(after)) * inner(x, x)
    slope = inner(x, {n: curvature.gradient[n] for n in x})
    ratio = ((after - curvature.value) / (0.5 * curved - slope)).astype(jnp.float32)
    due = rule.due(state.count + 1) | ~jnp.isfinite(after)
    damping = jnp.where(due, rule.adapted(state.damping, ratio), state.damping)
    return ratio, damping, jnp.isfinite(after)
