"""Whether a model treats the examples of a batch on their own.

Curvature is a sum over examples, so it is traced on one of them. For a model
whose examples meet, as in a batch normalisation by the batch's own statistics,
that would be the curvature of another function. Such a model is found by
running it: on made-up values, one example is changed, and the outputs of the
others must stay.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.equations import as_function
from kfgn.errors import ModelError
from kfgn.paths import path_name

PyTree = Any
Shape = jax.ShapeDtypeStruct
Draw = Callable[[np.ndarray], np.ndarray]

# A batch has three examples. The one in the middle is changed, so that both
# what flows to later examples and what flows to earlier ones is seen.
_COUNT = 3
_BEFORE, _AFTER = [0, 1, 2], [0, 3, 2]

_POOL = np.random.default_rng(0).normal(size=10007)  # a prime: rows of a matrix differ

# Signed values; positive ones, where those leave units dead or are outside of
# a function's domain; small ones, where others overflow.
_DRAWS: tuple[Draw, ...] = (
    lambda x: 0.5 * x,
    lambda x: 0.5 * np.abs(x),
    lambda x: 0.05 * np.abs(x) + 0.01,
)

# Models by identity, with the signatures that they passed with.
_passed: dict[int, tuple[weakref.ref, set[Any]]] = {}


def check_independent(
    model: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree
) -> None:
    """Raises ModelError if an example's outputs depend on other examples of the batch.

    A model that fails on a batch of made-up values is let pass.

    Args:
      model: `(params, inputs) -> outputs`.
      params: its parameters; only their shapes matter (arrays, tracers or
        `jax.ShapeDtypeStruct`).
      inputs: a batch of inputs; only shapes matter, and not the batch's size.
    """
    shapes = jax.tree.map(lambda a: _shape(a, a.shape), params)
    batch = jax.tree.map(lambda a: _shape(a, (_COUNT, *a.shape[1:])), inputs)
    leaves, tree = jax.tree.flatten((shapes, batch))
    known, signature = _signatures(model), (tree, tuple((s.shape, s.dtype) for s in leaves))
    if signature in known:
        return
    # The values are no part of a trace, or of a search for NaNs, that this may be called in.
    with jax.ensure_compile_time_eval(), jax.debug_nans(False), jax.debug_infs(False):
        found = _dependence(model, shapes, batch)
    if found is not None:
        raise ModelError(
            f"the examples of a batch are not independent: {found}. kfgn needs a model that acts "
            "on each example alone: give batch normalisation frozen statistics "
            "(use_running_average=True), and make other operations act within an example."
        )
    known.add(signature)


def _shape(array: Any, shape: tuple[int, ...]) -> Shape:
    return Shape(shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _signatures(model: Any) -> set[Any]:
    """The signatures that this model passed with, kept for as long as the model lives."""
    key = id(model)
    if key not in _passed:
        try:
            ref = weakref.ref(model, lambda _: _passed.pop(key, None))
        except TypeError:  # it does not tell when it dies
            return set()
        _passed[key] = ref, set()
    return _passed[key][1]


def _dependence(model: Callable, params: PyTree, batch: PyTree) -> str | None:
    """What moved when one example was changed, in words."""
    try:
        trials = _trials(model, params, batch)
    except Exception:
        return None  # the trace on one example tells what is wrong
    for before, after in trials:
        for name in before:
            for k in (0, 2):
                change, scale = _change(before[name][k], after[name][k])
                if change > _tolerance(before[name].dtype) * scale:
                    return (
                        f"with made-up values, {f'output {name!r}' if name else 'the output'} of "
                        f"example {k} moved by {change:.2g} (it reaches {scale:.2g}) when the "
                        "input of example 1 alone was changed"
                    )
    return None


Outputs = dict[str, np.ndarray]


def _trials(model: Callable, params: PyTree, batch: PyTree) -> list[tuple[Outputs, Outputs]]:
    """The outputs before and after the change, for each draw.

    Two draws are enough for which the outputs of the changed example move.
    """
    closed, out = jax.make_jaxpr(model, return_shape=True)(params, batch)
    jaxpr, tree = closed.jaxpr, jax.tree_util.tree_flatten_with_path(out)[0]
    names = {path_name(path): k for k, (path, s) in enumerate(tree) if _is_comparable(s)}
    outs = [jaxpr.outvars[k] for k in names.values()]
    function = as_function(jaxpr.eqns, [*jaxpr.constvars, *jaxpr.invars], outs)
    run, trials, alive = None, [], 0
    for draw in _DRAWS:
        fixed = jax.device_put([_made_up(x, draw, k) for k, x in enumerate(_fixed(closed, params))])
        examples = [_examples(s, draw, k) for k, s in enumerate(jax.tree.leaves(batch))]
        pair = [[*fixed, *(x[rows] for x in examples)] for rows in (_BEFORE, _AFTER)]
        run = run or jax.jit(function).lower(*pair[0]).compile()
        results = [dict(zip(names, map(np.asarray, run(*values)), strict=True)) for values in pair]
        trials.append((results[0], results[1]))
        moved = [_change(results[0][name][1], results[1][name][1])[0] for name in names]
        alive += any(0 < change < math.inf for change in moved)
        if alive == 2:
            break
    return trials


def _is_comparable(shape: Any) -> bool:
    is_number = not jnp.issubdtype(shape.dtype, jax.dtypes.extended)
    return is_number and shape.shape[:1] == (_COUNT,)


def _fixed(closed: Any, params: PyTree) -> list[Any]:
    """What is not changed: values that the model closes over, and shapes of parameters."""
    return [*closed.consts, *jax.tree.leaves(params)]


def _made_up(value: Any, draw: Draw, place: int) -> Any:
    """Made-up numbers for a shape or a tracer; a value that is known stays."""
    if not isinstance(value, (Shape, jax.core.Tracer)):
        return value
    return _as_dtype(_numbers(value.shape, value.dtype, draw, place), value.dtype)


def _examples(shape: Shape, draw: Draw, place: int) -> Any:
    """The examples of a batch, and one more to change the second into."""
    numbers = _numbers((_COUNT + 1, *shape.shape[1:]), shape.dtype, draw, -1 - place)
    if numbers.dtype == bool:
        numbers[3] = ~numbers[1]
    return _as_dtype(numbers, shape.dtype)


def _numbers(shape: tuple[int, ...], dtype: Any, draw: Draw, place: int) -> np.ndarray:
    """Floats from the draw; for integers and others zeros and ones, as booleans."""
    numbers = np.resize(np.roll(_POOL, 211 * place), shape)
    return draw(numbers) if jnp.issubdtype(dtype, jnp.inexact) else numbers > 0


def _as_dtype(numbers: np.ndarray, dtype: Any) -> Any:
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return numbers.astype(dtype)
    seeds = numbers.astype(np.uint32).reshape(-1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jnp.zeros((), dtype), seeds)
    return keys.reshape(numbers.shape)


def _change(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """By how much values moved, and how large they are."""
    kind = np.complex128 if np.iscomplexobj(before) else np.float64
    a, b = before.astype(kind), after.astype(kind)
    finite = np.isfinite(a) & np.isfinite(b)
    if np.any(np.isfinite(a) != np.isfinite(b)):
        return math.inf, np.max(np.abs(a[finite]), initial=0.0)
    a, b = a[finite], b[finite]
    return np.max(np.abs(a - b), initial=0.0), np.max(np.abs([a, b]), initial=0.0)


def _tolerance(dtype: Any) -> float:
    """The relative change that roundoff may make.

    An example's outputs mostly keep their bits: the same program runs. What
    sums in no fixed order, on some devices, moves them by some roundoff, and
    values inside may have fewer bits than the outputs.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 0.0
    return float(max(jnp.finfo(dtype).eps, jnp.finfo(jnp.float32).eps)) ** 0.5
