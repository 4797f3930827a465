"""One adapter for the general minimizers: scipy's L-BFGS-B and CG, optax's L-BFGS.

They are the quasi-Newton and nonlinear conjugate gradient methods that Veitch
compares Newton's with. All need an objective that stays the same, so a batch
here is one and fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from kfgn.base.checks import check_choice, check_not_negative, check_whole
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.types import Batch, PyTree, Scalar

Callback = Callable[[PyTree, float], Any]

MINIMIZERS = ("l-bfgs-b", "cg", "optax-lbfgs")


class Minimum(NamedTuple):
    """What `minimize` found, and how.

    >>> found = minimize(lambda x, _: (x - 1.0) ** 2, jnp.array(0.0), None)
    >>> found.converged, [float(v) for v in found.values]
    (True, [1.0, 0.0])
    """

    params: PyTree
    values: np.ndarray  # of the objective, at the start and after every iteration
    evaluations: int  # of value and gradient together
    converged: bool  # by the method's own word: scipy's also stop where values stall
    message: str


def minimize(
    objective: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Batch,
    method: str = "l-bfgs-b",
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-5,
    callback: Callback | None = None,
    options: dict[str, Any] | None = None,
) -> Minimum:
    """Minimizes an objective of one batch.

    scipy works on vectors in float64, the objective in the dtypes of params.
    Where a method ends at worse than the best iterate it had, that is returned.

    Args:
      objective: `(params, batch) -> scalar`, such as a `kfgn.Objective`.
      params: where to start.
      batch: passed on to the objective.
      method: "l-bfgs-b" or "cg" (`scipy.optimize.minimize`), or "optax-lbfgs"
        (`optax.lbfgs` with its zoom line search, on the device).
      max_iterations: at most so many.
      tolerance: converged where no entry of the gradient is larger.
      callback: called as `callback(params, value)` after every iteration.
      options: more of scipy's options for the method, or of `optax.lbfgs`'s.

    Returns:
      The parameters that were found, and how.

    Raises:
      OptionError: an unknown method, or an impossible option.
      ParameterError: the objective or its gradient is not finite at the start.

    >>> found = minimize(lambda x, target: jnp.sum((x - target) ** 2), jnp.zeros(2), 3.0)
    >>> found.params.round(4).tolist()
    [3.0, 3.0]
    """
    check_choice("method", method, MINIMIZERS)
    if not callable(objective):
        raise OptionError(f"objective must be callable, found a {type(objective).__name__}")
    check_whole("max_iterations", max_iterations, 1)
    check_not_negative("tolerance", tolerance)
    params = jax.tree.map(jnp.asarray, params)
    value, gradient = jax.jit(jax.value_and_grad(objective))(params, batch)
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((value, gradient))):
        raise ParameterError(
            f"the objective is {float(value)} at the parameters to start from, or its gradient is "
            "not finite; start from others."
        )
    largest = max((float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient)), default=0.0)
    problem = _Problem(
        objective,
        params,
        batch,
        float(value),
        largest,
        max_iterations,
        tolerance,
        callback or (lambda params, value: None),
        options or {},
    )
    return _by_optax(problem) if method == "optax-lbfgs" else _by_scipy(problem, method)


class _Problem(NamedTuple):
    objective: Callable[[PyTree, Any], Any]
    params: PyTree
    batch: Batch
    value: float  # at params
    largest: float  # entry of the gradient there
    max_iterations: int
    tolerance: float
    callback: Callback
    options: dict[str, Any]


def _by_scipy(problem: _Problem, method: str) -> Minimum:
    from scipy.optimize import minimize

    objective, params, batch, first, *_ = problem
    start, unravel = ravel_pytree(params)
    compiled = jax.jit(jax.value_and_grad(lambda x, data: objective(unravel(x), data)))

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = compiled(jnp.asarray(x, start.dtype), batch)
        value, gradient = float(value), np.asarray(gradient, np.float64)
        if not np.isfinite(value):  # what a line search turns back from
            return np.inf, np.zeros_like(gradient)
        return value, gradient

    x = np.asarray(start, np.float64)
    values, best = [first], (first, x)

    def record(intermediate_result: Any) -> None:
        nonlocal best
        x, value = intermediate_result.x, float(intermediate_result.fun)
        values.append(value)
        if value < best[0]:
            best = value, np.array(x)
        problem.callback(unravel(jnp.asarray(x, start.dtype)), value)

    found = minimize(
        function,
        x,
        jac=True,
        method=method.upper(),
        callback=record,
        options={"maxiter": problem.max_iterations, "gtol": problem.tolerance, **problem.options},
    )
    end = best[1] if not found.fun <= best[0] else found.x
    return Minimum(
        unravel(jnp.asarray(end, start.dtype)),
        np.asarray(values),
        int(found.nfev) + 1,
        bool(found.success),
        str(found.message),
    )


def _by_optax(problem: _Problem) -> Minimum:
    objective, params, batch, value, largest, max_iterations, tolerance, *_ = problem
    solver = optax.lbfgs(**problem.options)

    def value_fn(params: PyTree, batch: Batch) -> Scalar:
        return objective(params, batch)

    of_state = optax.value_and_grad_from_state(value_fn)

    @jax.jit
    def step(params: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Any, Any, Any]:
        value, gradient = of_state(params, batch, state=state)
        updates, state = solver.update(
            gradient, state, params, value=value, grad=gradient, value_fn=value_fn, batch=batch
        )
        get = optax.tree_utils.tree_get
        after = get(state, "value"), optax.tree.norm(get(state, "grad"), ord=jnp.inf)
        return optax.apply_updates(params, updates), state, after, get(state, "info")

    values, state, evaluations = [value], solver.init(params), 1
    best = value, params
    for _ in range(max_iterations):
        if largest <= tolerance:
            break
        params, state, (value, norm), info = step(params, state, batch)
        values.append(float(value))
        largest = float(norm)
        evaluations += int(info.num_linesearch_steps)
        problem.callback(params, values[-1])
        if not np.isfinite(values[-1]) or values[-1] >= best[0]:
            break
        best = values[-1], params
    converged = largest <= tolerance
    if converged:
        message = "the largest entry of the gradient is within tolerance"
    elif len(values) > max_iterations:
        message = "the greatest number of iterations was reached"
    else:
        message = "the line search found no lower value"
    return Minimum(best[1], np.asarray(values), evaluations, converged, message)
