"""Checks of derivatives by Taylor's theorem.

Along a direction d the remainders of a smooth function f shrink as

    | f(x + h d) - f(x) - h g'd |                  = O(h^2),
    | (f(x + h d) - f(x - h d)) / 2h - g'd |       = O(h^2)   (eq. 31 of Veitch),
    | f(x + h d) - f(x) - h g'd - h^2/2 d'Hd |     = O(h^3),

and by one order less, or not at all, where the gradient g or the Hessian H is
wrong. The steps h are halved, and the order is read off where the remainder has
not yet met the rounding of f. All is computed with the precision of the point.
The functions look at values, and so cannot be used inside `jax.jit`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from kfgn.base.checks import check_flag, check_positive, check_whole
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.linalg import inner
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, PyTree, Scalar
from kfgn.objective.objective import check_vector

Function = Callable[[PyTree], Scalar]

_ROUNDINGS = 10  # rounding errors of f that a remainder must exceed to be looked at
_WINDOW = 3  # the smallest steps above rounding, from which the order is read
_SLACK = 0.4  # what an observed order may lack of the expected one


class CheckResult(NamedTuple):
    """What a check observed; arrays have an entry for each step, the largest first.

    `order` is nan where fewer than two remainders are above rounding. `exact` says
    that none is, although the checked term itself is: f has no higher terms.

    >>> import jax.numpy as jnp, kfgn
    >>> wrong = lambda x: 2 * jnp.cos(x)
    >>> sine = lambda x: jnp.sum(jnp.sin(x))
    >>> found = kfgn.diagnostics.gradient_check(sine, jnp.ones(3), gradient=wrong)
    >>> found.passed, found.expected, round(found.order)
    (False, 2, 1)
    """

    order: float
    expected: int
    exact: bool
    steps: Float[np.ndarray, " S"]
    remainders: Float[np.ndarray, " S"]
    above_rounding: Bool[np.ndarray, " S"]

    @property
    def passed(self) -> bool:
        """Whether the order is at least the expected one, up to 0.4, or all is exact."""
        return self.exact or self.order >= self.expected - _SLACK


def gradient_check(
    function: Function,
    point: PyTree,
    direction: PyTree | None = None,
    key: Array | None = None,
    *,
    gradient: Callable[[PyTree], PyTree] | None = None,
    central: bool = False,
    step: float = 0.5,
    halvings: int = 24,
) -> CheckResult:
    """The observed order of the gradient's remainder; 2 is expected.

    Args:
      function: `point -> scalar`, smooth near the point.
      point: a pytree of floating-point arrays.
      direction: a pytree like the point; None draws normal entries.
      key: for the direction; None stands for `jax.random.key(0)`.
      gradient: `point -> pytree`, the one that is checked; None takes `jax.grad`.
      central: whether to use the central difference of eq. 31.
      step: the largest step h.
      halvings: how often the step is halved; fewer where the function's value is
        far smaller than the terms it sums, whose rounding is not known here.

    Raises:
      OptionError: an option has a wrong value, or the function's value is no
        finite scalar.
      ParameterError: the point has leaves that are no floating-point arrays, or
        the direction or gradient is not like it.

    >>> import jax.numpy as jnp, kfgn
    >>> kfgn.diagnostics.gradient_check(lambda x: jnp.sum(jnp.sin(x)), jnp.ones(3)).passed
    True
    """
    check_flag("central", central)
    direction, steps = _prepared(function, point, direction, key, step, halvings)
    return _check(function, point, direction, steps, gradient, None, central)


def curvature_check(
    function: Function,
    point: PyTree,
    product: Callable[[PyTree, PyTree], PyTree],
    direction: PyTree | None = None,
    key: Array | None = None,
    *,
    gradient: Callable[[PyTree], PyTree] | None = None,
    step: float = 0.5,
    halvings: int = 24,
) -> CheckResult:
    """The observed order of the remainder with the quadratic term; 3 is expected.

    Args:
      function, point, direction, key, gradient, step, halvings: as in `gradient_check`.
      product: `(point, vector) -> H vector` at the point, as in
        `lambda p, v: kfgn.hessian(objective).matvec(p, batch, v, with_l2=True)`
        for the function `lambda p: objective(p, batch)`.

    Raises:
      OptionError, ParameterError: as in `gradient_check`.

    >>> import jax.numpy as jnp, kfgn
    >>> sine = lambda x: jnp.sum(jnp.sin(x))
    >>> product = lambda x, v: -jnp.sin(x) * v
    >>> kfgn.diagnostics.curvature_check(sine, jnp.ones(3), product).passed
    True
    """
    if not callable(product):
        raise OptionError(f"product must be callable as product(point, vector), found {product!r}")
    direction, steps = _prepared(function, point, direction, key, step, halvings)
    return _check(function, point, direction, steps, gradient, product)


def _check(
    function: Function, point: PyTree, direction: PyTree, steps: Array,
    gradient: Callable[[PyTree], PyTree] | None,
    product: Callable[[PyTree, PyTree], PyTree] | None,
    central: bool = False,
) -> CheckResult:  # fmt: skip
    """The remainders of as many terms as are given, and the order that is observed."""
    first = jax.grad(function) if gradient is None else gradient
    unit = float(jnp.finfo(_least_precise((point, jax.eval_shape(function, point)))).eps)

    @jax.jit
    def measure(point: PyTree, direction: PyTree, steps: Array) -> tuple[Any, ...]:
        slopes = first(point)
        check_vector(point, slopes)
        terms = [function(point), inner(slopes, direction)]
        if product is not None:
            curved = product(point, direction)
            check_vector(point, curved)
            terms.append(0.5 * inner(curved, direction))

        def at(h: Scalar) -> Scalar:
            return function(jax.tree.map(lambda x, d: x + h.astype(x.dtype) * d, point, direction))

        moved = jax.tree.map(jnp.multiply, slopes, point)
        return terms, jax.lax.map(at, steps), jax.lax.map(at, -steps), inner(moved, moved)

    found = jax.tree.map(lambda x: np.asarray(x, np.float64), measure(point, direction, steps))
    terms, plus, minus, moved = found
    h = np.asarray(steps, np.float64)

    def rounding(*values: np.ndarray) -> np.ndarray:
        """The size of a rounding error of a sum of values, and of that of the point in f."""
        largest = np.max(np.abs(np.broadcast_arrays(*values)), axis=0)
        return unit * (largest + np.sqrt(moved))

    with np.errstate(all="ignore"):
        if central:
            remainder, error = (plus - minus) / (2 * h) - terms[1], rounding(plus, minus) / h
            return _observed(np.abs(remainder), error, h, 2, np.abs(terms[1]))
        series = [term * h**k for k, term in enumerate(terms)]
        remainder = np.abs(functools.reduce(np.subtract, series, plus))
        return _observed(remainder, rounding(plus, *series), h, len(terms), np.abs(series[-1][0]))


def _observed(
    remainder: Float[np.ndarray, " S"],
    rounding: Float[np.ndarray, " S"],
    steps: Float[np.ndarray, " S"],
    expected: int,
    term: float,
) -> CheckResult:
    """The order, by least squares in logarithms over the smallest steps above rounding."""
    finite = np.isfinite(remainder) & np.isfinite(rounding)
    above = finite & (remainder > _ROUNDINGS * rounding)
    # Noise may exceed the bound again at smaller steps: the range ends where it is first met.
    met = np.flatnonzero(finite & ~above)
    if met.size:
        above[met[0] :] = False
    used = np.flatnonzero(above)[-_WINDOW:]
    order = float("nan")
    if used.size >= 2:
        order = float(np.polyfit(np.log(steps[used]), np.log(remainder[used]), 1)[0])
    exact = not above.any() and bool(finite[0] and term > _ROUNDINGS * rounding[0])
    return CheckResult(order, expected, exact, steps, remainder, above)


def _prepared(
    function: Function, point: PyTree, direction: PyTree, key: Any, step: float, halvings: int
) -> tuple[PyTree, Float[Array, " S"]]:
    """The direction and the steps, with everything checked."""
    check_positive("step", step)
    check_whole("halvings", halvings, 1)
    leaves = named_leaves(point)
    if not leaves:
        raise ParameterError("the point has no leaves: expected a pytree of floating-point arrays")
    for name, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            found = f"a {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
            raise ParameterError(
                f"the point's leaf {name!r} must be a floating-point array, found {found}"
            )
    if not callable(function):
        raise OptionError(f"function must be callable as function(point), found {function!r}")
    shape = jax.eval_shape(function, point)
    if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise OptionError(f"function must return a floating-point scalar, found {shape}")
    value = jax.jit(function)(point)
    if not bool(jnp.isfinite(value)):
        raise OptionError(f"function must be finite at the point, found {float(value)} there")
    if direction is None:
        key = jax.random.key(0) if key is None else key
        direction = optax.tree_utils.tree_random_like(key, point)
    check_vector(point, direction)
    if not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(direction)):
        raise OptionError("direction is zero in every entry: pass another, or None to draw one")
    return direction, jnp.asarray(step * 0.5 ** np.arange(int(halvings) + 1), _least_precise(point))


def _least_precise(tree: PyTree) -> Any:
    """The dtype of the leaves with the largest rounding unit."""
    dtypes = [jnp.dtype(x.dtype) for x in jax.tree.leaves(tree)]
    return max(map(jax.dtypes.canonicalize_dtype, dtypes), key=lambda d: jnp.finfo(d).eps)
