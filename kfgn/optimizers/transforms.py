"""The parts of the recipe as optax transformations.

Each returns a positive multiple of a direction of ascent, `+C^-1 g`; the sign
of a descent step belongs to `optax.scale_by_learning_rate`. Each reads the
batch from the keyword argument `curvature` of `update`. A batch whose numbers
are not finite changes nothing but the count of skipped updates.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from kfgn.base.checks import (
    check_decay,
    check_flag,
    check_not_negative,
    check_positive,
)
from kfgn.base.linalg import inner
from kfgn.base.types import Array, Named, Number, Scalar
from kfgn.curvature.curvature import Curvature
from kfgn.optimizers.damping import Fixed
from kfgn.optimizers.layer_blocks import NO_BLOCKS, LayerBlocks
from kfgn.optimizers.observe import Observed, observe
from kfgn.optimizers.periods import check_period, inversion_due
from kfgn.optimizers.quadratic_model import best_step, combine, push
from kfgn.optimizers.sharding import preconditioner_of
from kfgn.optimizers.skipped import SkippedStreak, no_streak
from kfgn.optimizers.staggered import check_stagger, refresh_in_turns
from kfgn.optimizers.state import (
    Count,
    Metrics,
    all_finite,
    counter,
    guarded,
    is_usable,
    no_metrics,
    number,
    stay,
    zeros_like,
)
from kfgn.optimizers.verdict import Verdict, judge
from kfgn.optimizers.wrappers import by_curvature


class ScaleByKroneckerState(NamedTuple):
    """State of `scale_by_kronecker`."""

    count: Count  # type: ignore[assignment]  # updates made
    skipped: Count  # updates skipped, for numbers that were not finite
    streak: SkippedStreak  # of those, in a row up to now
    observed: Count  # factors in the average
    metrics: Metrics
    factors: Named
    inverses: Named


def scale_by_kronecker(
    blocks: LayerBlocks,
    damping: Number = 1e-2,
    *,
    decay: Number | None = 0.9,
    refresh_factors_every: int | Array = 1,
    refresh_inverse_every: int | Array = 1,
    inverse: str = "factored",
    factor_sharding: NamedSharding | None = None,
    stagger: bool = False,
    warn_after_skipped: int | Array | None = 10,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `(Q ⊗ G + damping I)^-1` in every layer, eqs. (34)-(36).

    Args:
      blocks: what `kfgn.layers.find_blocks` returned.
      damping: `k = γ + η`, fixed.
      inverse: "factored" (two Cholesky factorizations per layer), "eigen" (exact, two
        eigendecompositions) or "ekfac", as for `kfgn.kfra`.
      others: as for `kfgn.kfra`.

    Raises:
      OptionError: an option out of its range.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx = scale_by_kronecker(kfgn.layers.find_blocks(objective, w, batch), 1.0, inverse="eigen")
    >>> (_, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> step, _ = tx.update(grads, tx.init(w), w, curvature=curvature)
    >>> round(float(step[0, 0]), 6)  # the gradient is 9, Q is 9 and G is 1
    0.9
    """
    check_positive("damping", damping)
    check_decay("decay", decay)
    check_period("refresh_factors_every", refresh_factors_every)
    check_period("refresh_inverse_every", refresh_inverse_every)
    preconditioner = preconditioner_of(blocks, inverse, factor_sharding)
    check_stagger(stagger, refresh_inverse_every)

    def init(leaves: Named) -> ScaleByKroneckerState:
        start = counter(), counter(), no_streak(), counter(), no_metrics()
        return ScaleByKroneckerState(*start, *preconditioner.init(leaves))

    def refreshed(count: Count, factors: Any, known: Any, total: Scalar, look: Any) -> Any:
        if stagger:
            turn = count, cast(int, refresh_inverse_every), jnp.array(True)
            inverses, extremes = refresh_in_turns(preconditioner, factors, known, total, *turn)
            return *preconditioner.rescale(inverses, *look), extremes
        due = inversion_due(count, refresh_inverse_every)
        parts = preconditioner.decompose(factors, known[0], due)
        parts, fine = preconditioner.rescale(parts, *look)
        if preconditioner.undamped:
            known = parts, known[1]
        made = preconditioner.invert, preconditioner.extremes
        new = jax.lax.cond(due, lambda: tuple(f(parts, total) for f in made), lambda: known)
        return new[0], fine, new[1]

    def advance(
        state: ScaleByKroneckerState, gradient: Named, curvature: Curvature, **_: Any
    ) -> tuple[Named, ScaleByKroneckerState]:
        usable = is_usable(curvature, gradient)
        before = Observed(state.factors, state.observed, usable)
        factors, observed, usable = observe(
            *(curvature, before, state.count, refresh_factors_every, decay),
            *(preconditioner, gradient),
        )

        def move() -> tuple[Named, ScaleByKroneckerState]:
            total = jnp.asarray(damping)
            known = state.inverses, (state.metrics.largest_eigenvalue, state.metrics.condition)
            look = curvature, observed, observed > state.observed, decay
            inverses, fine, extremes = refreshed(state.count, factors, known, total, look)
            direction = preconditioner.apply(inverses, total, gradient)
            norms = (jnp.sqrt(inner(x, x)) for x in (gradient, direction))
            seen = (jnp.asarray(x, jnp.float32) for x in (curvature.value, *norms, *extremes))
            moved = state._replace(
                count=state.count + 1,
                observed=observed,
                metrics=Metrics(*seen),
                factors=factors,
                inverses=inverses,
            )
            return guarded(fine & all_finite(direction), direction, moved, state)

        return jax.lax.cond(usable, move, lambda: stay(gradient, state))

    return by_curvature(ScaleByKroneckerState, blocks, init, advance, warn_after_skipped)


#: When steps of the quadratic model are measured, beside the first: no damping adapts.
_MEASURED = Fixed(0.0, period=5)


class ScaleByQuadraticModelState(NamedTuple):
    """State of `scale_by_quadratic_model`."""

    count: Count  # type: ignore[assignment]  # updates made
    skipped: Count  # updates skipped
    streak: SkippedStreak  # of those, in a row up to now
    step_size: Scalar  # α
    momentum: Scalar  # the coefficient of the previous step
    predicted_change: Scalar  # of the objective, by the model
    reduction_ratio: Scalar  # actual / predicted change, as last measured
    previous: Named  # the previous step, or nothing without momentum


def scale_by_quadratic_model(
    damping: Number = 0.0, *, momentum: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Scales a direction to the minimum of the quadratic model along it, eq. (40).

    The model has the full Gauss-Newton matrix of the batch, so this makes a
    step size for any direction, not only one of kfgn's. The first step, every fifth, and
    those after a rise are measured, and cut where the objective rises by more
    than was promised as its fall, as in `kfgn.transforms.scale_by_curvature`.

    Args:
      damping: `τ + η`, added to the Gauss-Newton matrix.
      momentum: minimize over the span of the direction and the previous step
        (Martens & Grosse 2015, section 7).

    Raises:
      OptionError: an option out of its range.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx = scale_by_quadratic_model()
    >>> (_, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> step, _ = tx.update(grads, tx.init(w), w, curvature=curvature)
    >>> float(step[0, 0])  # to the minimum at 0
    1.0
    """
    check_not_negative("damping", damping)
    check_flag("momentum", momentum)

    def init(leaves: Named) -> ScaleByQuadraticModelState:
        previous = zeros_like(leaves) if momentum else {}
        numbers = number(1), number(), number(), number(1)
        return ScaleByQuadraticModelState(counter(), counter(), no_streak(), *numbers, previous)

    def advance(
        state: ScaleByQuadraticModelState, gradient: Named, curvature: Curvature, **_: Any
    ) -> tuple[Named, ScaleByQuadraticModelState]:
        directions = [push(curvature, gradient)]
        if momentum:
            directions.append(push(curvature, state.previous))
        best = best_step(curvature, directions, jnp.asarray(damping))
        step = combine(directions, best.coefficients)
        usable = is_usable(curvature, (best, step))
        known = state.reduction_ratio, number(), state.predicted_change, number()
        before = Verdict(*known, finite=jnp.array(True), share=number(1))
        given = _MEASURED, state.count, before, curvature, best, step, usable, number(1)
        verdict, step = judge(*given)
        moved = state._replace(
            count=state.count + 1,
            step_size=verdict.share * best.step_size,
            momentum=verdict.share * best.momentum,
            predicted_change=best.predicted.astype(jnp.float32),
            reduction_ratio=verdict.ratio,
            previous=step if momentum else {},
        )
        return guarded(usable & verdict.finite, step, moved, state)

    return by_curvature(ScaleByQuadraticModelState, NO_BLOCKS, init, advance)


class ClipByCurvatureState(NamedTuple):
    """State of `clip_by_curvature`."""

    skipped: Count  # updates skipped
    streak: SkippedStreak  # of those, in a row up to now
    curved: Scalar  # d'Gd of the last update d that came in
    clipped: Count  # updates that were made shorter


def clip_by_curvature(bound: Number = 1e-2) -> optax.GradientTransformationExtraArgs:
    """Shortens an update d to `d'Gd <= bound`, a trust region in the metric of the model.

    `d'Gd / 2`, G the full Gauss-Newton matrix of the batch, is the divergence between the
    model's distributions before and after, to second order, where the loss is a likelihood.
    Put it last in a chain, after momentum and learning rate, whose step it bounds.

    Args:
      bound: the most that `d'Gd` may be.

    Raises:
      OptionError: an option out of its range.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((1, 1)), (jnp.full((4, 1), 3.0), jnp.zeros((4, 1)))
    >>> tx = clip_by_curvature(0.09)
    >>> (_, grads), curvature = kfgn.value_grad_and_curvature(objective)(w, batch)
    >>> step, _ = tx.update(-grads, tx.init(w), w, curvature=curvature)
    >>> round(float(step[0, 0]), 6)  # G is 9
    -0.1
    """
    check_positive("bound", bound)

    def init(leaves: Named) -> ClipByCurvatureState:
        del leaves
        return ClipByCurvatureState(counter(), no_streak(), number(), counter())

    def advance(
        state: ClipByCurvatureState, update: Named, curvature: Curvature, **_: Any
    ) -> tuple[Named, ClipByCurvatureState]:
        outputs = push(curvature, update).outputs
        curved = curvature.output_product(outputs, outputs).astype(jnp.float32)
        clips = curved > bound
        scale = jnp.where(clips, jnp.sqrt(bound / jnp.where(clips, curved, 1)), 1)
        moved = state._replace(curved=curved, clipped=state.clipped + clips.astype(jnp.int32))
        short = {n: scale.astype(x.dtype) * x for n, x in update.items()}
        return guarded(is_usable(curvature, (curved, short)), short, moved, state)

    return by_curvature(ClipByCurvatureState, NO_BLOCKS, init, advance)
