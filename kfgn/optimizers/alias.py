"""`kfra`, `kflr` and `kfac`: the complete optimizer in one call.

The three differ in the factors alone, which the `curvature` of each update
brings along, so they are one recipe, with one set of options.
"""

from __future__ import annotations

from typing import Any

import optax

from kfgn.base.checks import check_pair
from kfgn.base.errors import OptionError
from kfgn.objective.objective import Objective
from kfgn.optimizers.damping import Damping
from kfgn.optimizers.layer_blocks import find_blocks
from kfgn.optimizers.recipe import scale_by_curvature
from kfgn.optimizers.transforms import average_parameters

PyTree = Any

#: The paper's own settings (appendix C): no momentum, thresholds as printed.
#: Its text leaves the initial dampings open; 150 is what Martens & Grosse
#: (2015), whom it follows, start from (γ there is the root of τ + η).
PAPER = {
    "learning_rate": 1.0,
    "decay": 0.9,
    "factor_damping": 150.0**0.5,
    "factor_damping_bounds": (1e-10, 1e10),
    "step_damping": 150.0,
    "step_damping_bounds": (0.0, 1e10),
    "thresholds": (0.75, 0.75),
    "refresh_inverse_every": 1,
    "inverse": "factored",
    "momentum": False,
    "average_decay": 0.95,
}

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}


def kfra(
    objective: Objective,
    params: PyTree,
    batch: Any,
    *,
    preset: str = "default",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The full recipe with the factors of method "kfra", eqs. (26), (33)-(45).

        state = optimizer.init(params)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)

    Args:
      objective: the objective that is minimized.
      params: its parameters; only their shapes matter (arrays or
        `jax.ShapeDtypeStruct`).
      batch: a batch `(inputs, targets)`; only shapes matter, likewise.
      preset: "default", or "paper" for the paper's own settings.
      **options: the keyword arguments of `optimizer` below, over the preset's.

    Raises:
      LayerError: a parameter belongs to no layer.
      OptionError: an unknown or impossible option.
      BatchError, ModelError, LossError, ParameterError: the input does not fit.
    """
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)}")
    chosen = {**PRESETS[preset], **options}
    unknown = [name for name in chosen if name not in _OPTIONS]
    if unknown:
        raise OptionError(
            f"unknown option(s) {', '.join(map(repr, unknown))}: expected some of "
            f"{', '.join(_OPTIONS)}"
        )
    return optimizer(objective, params, batch, **chosen)


def kflr(
    objective: Objective, params: PyTree, batch: Any, *, preset: str = "default", **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The full recipe with the factors of method "kflr", eqs. (23)-(25); see `kfra`."""
    return kfra(objective, params, batch, preset=preset, **options)


def kfac(
    objective: Objective, params: PyTree, batch: Any, *, preset: str = "default", **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The full recipe with the factors of method "kfac", appendix D.3; see `kfra`."""
    return kfra(objective, params, batch, preset=preset, **options)


def optimizer(
    objective: Objective,
    params: PyTree,
    batch: Any,
    *,
    learning_rate: Any = 0.9,
    decay: Any = 0.85,
    factor_damping: Any = None,
    factor_damping_bounds: tuple[Any, Any] = (1e-9, 1e6),
    factor_damping_period: int = 20,
    step_damping: Any = 2.0,
    step_damping_bounds: tuple[Any, Any] = (1e-9, 1e6),
    step_damping_period: int = 5,
    damping_decay: float = 0.95,
    thresholds: tuple[float, float] = (0.25, 0.75),
    refresh_inverse_every: Any = 5,
    inverse: str = "factored",
    momentum: bool = True,
    average_decay: Any = None,
    unassigned: str = "raise",
) -> optax.GradientTransformationExtraArgs:
    """The recipe behind `kfra`, `kflr` and `kfac`, with its options.

    Args:
      objective, params, batch: as for `kfra`.
      learning_rate: a factor, or an optax schedule, on the step that the
        quadratic model picks; 1 takes it whole. The model is that of one
        batch, so its minimum goes too far for the others: hence 0.9.
      decay: of the moving average of the factors; None uses each batch's own.
      factor_damping: the initial γ, added to the Kronecker factors; None lets
        it follow τ, which measures better and saves the search.
      factor_damping_bounds: the least and the greatest γ.
      factor_damping_period: updates between adaptions of γ; 0 keeps it fixed.
      step_damping: the initial τ, added to the full Gauss-Newton matrix.
      step_damping_bounds: the least and the greatest τ.
      step_damping_period: updates between adaptions of τ; 0 keeps it fixed.
      damping_decay: both adapt by this factor per update of their period.
      thresholds: τ falls where the reduction ratio is above the second of
        them, and rises where it is below the first.
      refresh_inverse_every: updates between inversions of the factors.
      inverse: "factored" damping, eq. (36), or "eigen" for the exact eq. (35).
      momentum: let the quadratic model weigh the previous step in too (Martens
        & Grosse 2015, section 7), at the cost of one more linear pass. A step
        that goes against it, or more than once along it, extrapolates: it is
        taken only where the batch's objective falls, else `refused`.
      average_decay: β of the average of the parameters, eq. (44), kept in the
        state as `average`; None keeps none.
      unassigned: "raise"; "diagonal" to precondition parameters in no layer by
        the exact diagonal of the Gauss-Newton matrix; "gradient" to give them
        damped gradient steps. Say the same to `value_grad_and_curvature`.
    """
    blocks = find_blocks(objective, params, batch, unassigned=unassigned)
    gamma_bounds = check_pair("factor_damping_bounds", factor_damping_bounds)
    tau_bounds = check_pair("step_damping_bounds", step_damping_bounds)
    gamma = None
    if factor_damping is not None:
        gamma = Damping(factor_damping, *gamma_bounds, factor_damping_period, damping_decay)
    tau = Damping(step_damping, *tau_bounds, step_damping_period, damping_decay)
    parts = [
        scale_by_curvature(
            blocks,
            l2=objective.l2,
            factor_damping=gamma,
            step_damping=tau,
            thresholds=thresholds,
            decay=decay,
            refresh_inverse_every=refresh_inverse_every,
            inverse=inverse,
            momentum=momentum,
        ),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if average_decay is not None:
        parts.append(average_parameters(average_decay))
    return optax.chain(*parts)


_OPTIONS = tuple(optimizer.__kwdefaults__ or ())
