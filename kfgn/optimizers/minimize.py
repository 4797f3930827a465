"""One adapter for the general minimizers: scipy's L-BFGS-B and CG, optax's L-BFGS.

They are the quasi-Newton and nonlinear conjugate gradient methods that Veitch
compares Newton's with. All need an objective that stays the same, so a batch
here is one and fixed.
"""

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
Objective = Callable[[PyTree, Any], Any]

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
    objective: Objective,
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
    path = _Path(params, float(value), callback or (lambda params, value: None))
    if method == "optax-lbfgs":
        largest = max((float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient)), default=0.0)
        given = options or {}
        ended = _by_optax(path, objective, batch, max_iterations, tolerance, largest, given)
    else:
        given = {"maxiter": max_iterations, "gtol": tolerance, **(options or {})}
        ended = _by_scipy(path, objective, batch, method, given)
    return Minimum(path.best[1], np.asarray(path.values), *ended)


class _Path:
    """The values of the iterates, and the best of these."""

    def __init__(self, params: PyTree, value: float, callback: Callback):
        self.values, self.best, self.callback = [value], (value, params), callback

    def add(self, params: PyTree, value: float) -> bool:
        """Whether the next iterate is better than all before."""
        self.values.append(value)
        self.callback(params, value)
        better = np.isfinite(value) and value < self.best[0]
        if better:
            self.best = value, params
        return bool(better)


def _by_scipy(
    path: _Path, objective: Objective, batch: Batch, method: str, options: dict[str, Any]
) -> tuple[int, bool, str]:
    """Evaluations, whether it converged, and the message."""
    from scipy.optimize import minimize

    start, unravel = ravel_pytree(path.best[1])
    compiled = jax.jit(jax.value_and_grad(lambda x, data: objective(unravel(x), data)))

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = compiled(jnp.asarray(x, start.dtype), batch)
        value, gradient = float(value), np.asarray(gradient, np.float64)
        if not np.isfinite(value):  # what a line search turns back from
            return np.inf, np.zeros_like(gradient)
        return value, gradient

    def params_of(result: Any) -> PyTree:
        return unravel(jnp.asarray(result.x, start.dtype))

    def record(intermediate_result: Any) -> None:
        path.add(params_of(intermediate_result), float(intermediate_result.fun))

    first = np.asarray(start, np.float64)
    found = minimize(
        function, first, jac=True, method=method.upper(), callback=record, options=options
    )
    if found.fun <= path.best[0]:
        path.best = found.fun, params_of(found)
    return int(found.nfev) + 1, bool(found.success), str(found.message)


def _by_optax(
    path: _Path, objective: Objective, batch: Batch, max_iterations: int, tolerance: float,
    largest: float, options: dict[str, Any],
) -> tuple[int, bool, str]:  # fmt: skip
    """As `_by_scipy`, from where the largest entry of the gradient is known."""
    solver = optax.lbfgs(**options)

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

    params = path.best[1]
    state, evaluations = solver.init(params), 1
    for _ in range(max_iterations):
        if largest <= tolerance:
            break
        params, state, (value, norm), info = step(params, state, batch)
        largest = float(norm)
        evaluations += int(info.num_linesearch_steps)
        if not path.add(params, float(value)):
            break
    converged = largest <= tolerance
    if converged:
        message = "the largest entry of the gradient is within tolerance"
    elif len(path.values) > max_iterations:
        message = "the greatest number of iterations was reached"
    else:
        message = "the line search found no lower value"
    return evaluations, converged, message
