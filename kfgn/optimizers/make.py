"""An optimizer and its curvature in one call, with the method that is cheap enough."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from kfgn.base.checks import check_choice
from kfgn.base.errors import CostWarning, ModelError, OptionError
from kfgn.base.types import Batch, PyTree
from kfgn.curvature.batch import value_grad_and_curvature
from kfgn.curvature.methods import METHODS, method_of
from kfgn.diagnostics.inspect import Totals, inspection_of
from kfgn.objective.sum_of import AnyObjective
from kfgn.optimizers.alias import kfac, kflr, kfra

_ALIASES = {"kflr": kflr, "kfra": kfra, "kfac": kfac}  # the more exact first
_DEAR = 10.0  # gradients, above which an update is warned of
_SIZES = "large_factors", "factor_limit"
_PERIODS = "refresh_factors_every", "refresh_inverse_every"
_ROWS = 4  # for each of Q, from the examples that kernels at several positions take
_ALIKE = 1.5  # times the least cost, up to which the more exact method is taken


class Made(NamedTuple):
    """What `make` returns: unpack it, `optimizer, curvature_fn = kfgn.make(...)`."""

    optimizer: optax.GradientTransformationExtraArgs
    curvature_fn: Callable[..., Any]


def make(
    objective: AnyObjective, params: PyTree, batch: Batch, *, method: str = "auto", **options: Any
) -> Made:
    """The optimizer and the function of the curvature that it needs, told everything once.

        optimizer, curvature_fn = kfgn.make(objective, params, batch)
        (value, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)

    Args:
      objective, params, batch: as for `kfgn.kfra`; only shapes matter.
      method: "kfra", "kflr", "kfac", or "auto": the most exact of "kflr", "kfra" and
        "kfac", in that order, among those whose update is predicted to take at most
        1.5 times the cheapest one's, by the costs that `kfgn.inspect` shows; "kfra",
        which unrolls loops, only where there are none, or no other can be taken.
      options: of `kfgn.kfra` and of `kfgn.value_grad_and_curvature`; those that both
        have go to both. Two are its own where they are not given, for what they save:
        `activation_rows=4`; and factors with three times as many rows as a batch has
        examples (times positions), and more than 256, are kept as blocks on their diagonals,
        `large_factors="split"` with the `factor_limit` that `kfgn.inspect` shows.

    Returns:
      `(optimizer, curvature_fn)`. The latter takes a `key=` whatever the method is, and
      leaves it aside where nothing is drawn: pass a new one for each batch.

    Raises:
      OptionError: an unknown method or option.
      ModelError: "kfra" would form a matrix above the limit.
      LayerError, BatchError, LossError, ParameterError: the input does not fit.

    Warns:
      CostWarning: an update is predicted to take more than ten gradients.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> w, batch = jnp.ones((3, 2)), (jnp.eye(3), jnp.zeros((3, 2)))
    >>> optimizer, curvature_fn = kfgn.make(objective, w, batch, step_damping=1e-6)
    >>> (value, grads), curvature = curvature_fn(w, batch, key=jax.random.key(0))
    >>> updates, state = optimizer.update(grads, optimizer.init(w), w, curvature=curvature)
    >>> bool(objective(w + updates, batch) < 0.1 * value), curvature.settings.method
    (True, 'kflr')
    """
    check_choice("method", method, ("auto", *_ALIASES))
    _split(options)  # unknown ones are refused before the model is read
    options, totals = _with_savings(objective, params, batch, options)
    ours = _split(options)
    able = _able(totals, options)
    by_cost = all(str(options.get(n)) == "auto" for n in _PERIODS)
    costs = totals.update_auto if by_cost else totals.update
    if method == "auto":
        # Loops that stay loops compile in a time that does not grow with their length.
        kept = [n for n in able if n != "kfra" or not totals.unrolls] or able
        least = min(costs[n] for n in kept)
        method = next(n for n in kept if costs[n] <= _ALIKE * least)
    elif method == "kfra" and "kfra" not in able:
        raise ModelError(
            f'method "kfra" would form a matrix of {totals.largest:,} x {totals.largest:,} '
            f"entries, above the limit; expected a smaller one: pass "
            f'spatial="homogeneous", or a method among {", ".join(able)}'
        )
    others = {f"method {n!r}": costs[n] for n in able if n != method}
    others[" and ".join(f'{n}="auto"' for n in _PERIODS)] = totals.update_auto[method]
    _warn_of_cost(method, costs[method], others, totals)
    optimizer = _ALIASES[method](objective, params, batch, **ours[0])
    measured = value_grad_and_curvature(objective, method, **ours[1])
    draws = method_of(method).draws

    def curvature_fn(params: PyTree, batch: Batch, *, key: jax.Array | None = None) -> Any:
        return measured(params, batch, key=key if draws else None)

    return Made(optimizer, curvature_fn)


def _with_savings(
    objective: AnyObjective, params: PyTree, batch: Batch, options: dict[str, Any]
) -> tuple[dict[str, Any], Totals]:
    """The options, with those that save time where they are not given, and the costs then."""
    seen = inspect.signature(inspection_of).parameters

    def totals() -> Totals:
        known = {n: x for n, x in options.items() if n in seen}
        return inspection_of(objective, params, batch, **known).totals

    options = {"activation_rows": _ROWS, **options}
    found = totals()
    if found.split_at is None or found.too_large or not {*_SIZES}.isdisjoint(options):
        return options, found
    options |= {"large_factors": "split", "factor_limit": found.split_at}
    return options, totals()


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the optimizer, and of its curvature."""
    known = [
        [n for n, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for f in (kfra, value_grad_and_curvature)
    ]
    if unknown := [n for n in options if n not in {*known[0], *known[1]}]:
        raise OptionError(
            f"unknown option(s) {', '.join(map(repr, unknown))}: expected some of "
            f"{', '.join(sorted({*known[0], *known[1]}))}"
        )
    optimizer, curvature = ({n: options[n] for n in names if n in options} for names in known)
    return optimizer, curvature


def _able(totals: Totals, options: dict[str, Any]) -> list[str]:
    """The methods that can be taken, the more exact first."""
    spatial = options.get("spatial", "joint")
    able = [n for n in _ALIASES if spatial in METHODS[n].spatial]
    if spatial == "joint" and not totals.feasible:
        able.remove("kfra")
    return able


def _warn_of_cost(method: str, cost: float, others: dict[str, float], totals: Totals) -> None:
    """Warns of a dear method, with what is cheapest of the others."""
    if cost <= _DEAR:
        return
    advice = ""
    if totals.between[method] >= totals.roots > totals.flops[method] / 2:
        advice = (
            " Most of it decomposes the loss's output Hessian of every example: take a loss of "
            'kfgn.losses, or for "kfac" pass sample= to kfgn.losses.from_function.'
        )
    best = min(others, key=lambda n: others[n])
    remedy = "nothing is cheaper: take a larger batch, whose gradient costs more"
    if others[best] < cost:
        remedy = f"{best} is predicted to take {others[best]:.1f}"
    warnings.warn(
        f"an update by method {method!r} is predicted to take {cost:.0f} times a gradient; "
        f"{remedy}. kfgn.inspect(objective, params, batch) shows where it goes.{advice}",
        CostWarning,
        stacklevel=3,
    )
