"""Whether a model treats the examples of a batch on their own.

Curvature is a sum over examples, so it is traced on one of them. For a model
whose examples meet, as in a batch normalization by the batch's own statistics,
that would be the curvature of another function. Such a model is found by
running it: on made-up values, some examples are changed, and the outputs of
the others must stay.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import ModelError
from kfgn.base.trees import path_name
from kfgn.base.types import PyTree
from kfgn.model.equations import abstract, as_function

Shape = jax.ShapeDtypeStruct
Draw = Callable[[np.ndarray], np.ndarray]

# Three examples, and three more that they are changed into. Changing the one in
# the middle is seen where examples meet in pairs or on average, changing those
# around it where all look at the first or at the last.
_COUNT = 3
_FIRST = [0, 1, 2]
_CHANGES = ([0, 4, 2], [3, 1, 5])

# The program runs a few times, on three examples: it is not worth optimizing. (On CPU.)
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

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
    shapes = jax.tree.map(lambda a: abstract(a, a.shape), params)
    batch = jax.tree.map(lambda a: abstract(a, (_COUNT, *a.shape[1:])), inputs)
    leaves, tree = jax.tree.flatten((shapes, batch))
    known, signature = _signatures(model), (tree, tuple((s.shape, s.dtype) for s in leaves))
    if signature in known:
        return
    # Made-up values may leave a function's domain, which is no bug to search for, and
    # that they are put on a device is no transfer of the user's.
    with jax.debug_nans(False), jax.debug_infs(False), jax.transfer_guard("allow"):
        found = _dependence(model, shapes, batch)
    if found is not None:
        raise ModelError(
            f"the examples of a batch are not independent: {found}. kfgn needs a model that acts "
            "on each example alone: give batch normalization frozen statistics "
            "(use_running_average=True, or eval() in nnx), and make other operations act within an "
            "example."
        )
    known.add(signature)


def _signatures(model: Any) -> set[Any]:
    """The signatures that this model passed with, kept for as long as the model lives."""
    key = id(model)
    ref, signatures = _passed.get(key, (lambda: None, set()))
    if ref() is not model:
        try:
            signatures = set()
            _passed[key] = weakref.ref(model, lambda _: _passed.pop(key, None)), signatures
        except TypeError:
            pass  # it does not tell when it dies: nothing is kept
    return signatures


def _dependence(model: Callable, params: PyTree, batch: PyTree) -> str | None:
    """What moved when one example was changed, in words."""
    try:
        run, known, names = _compile(model, params, batch)
        fixed = [*known, *jax.tree.leaves(params)]
        # The values are no part of a trace that this may be called in.
        with jax.ensure_compile_time_eval():
            trials = _trials(run, fixed, jax.tree.leaves(batch))
    except Exception:
        return None  # the trace on one example tells what is wrong
    for rows, before, after in trials:
        for name, a, b in zip(names, before, after, strict=True):
            for k in set(rows).intersection(_FIRST):
                change, scale = _change(a[k], b[k])
                if change > _tolerance(a.dtype) * scale:
                    moved = f"moved by {change:.2g} (it reaches {scale:.2g})"
                    return (
                        f"with made-up values, {f'output {name!r}' if name else 'the output'} of "
                        f"example {k} {moved if change < math.inf else 'turned finite or not'} "
                        f"when the input of {_named(rows)} alone was changed"
                    )
    return None


def _named(rows: list[int]) -> str:
    changed = [str(k) for k in _FIRST if rows[k] != k]
    return f"example{'s' * (len(changed) > 1)} {' and '.join(changed)}"


def _compile(
    model: Callable, params: PyTree, batch: PyTree
) -> tuple[Callable[..., Any], list[Any], list[str]]:
    """The model on `(*known, *params, *inputs)`, what it closes over, and its outputs' names.

    What it closes over may be known, or traced around this call.
    """
    closed, out = jax.make_jaxpr(model, return_shape=True)(params, batch)
    jaxpr, outs = closed.jaxpr, jax.tree_util.tree_flatten_with_path(out)[0]
    kept = [k for k, (_, shape) in enumerate(outs) if _is_comparable(shape)]
    function = as_function(
        jaxpr.eqns, [*jaxpr.constvars, *jaxpr.invars], [jaxpr.outvars[k] for k in kept]
    )
    known = [abstract(x, x.shape) if _is_tracer(x) else x for x in closed.consts]
    lowered = jax.jit(function).lower(*known, *jax.tree.leaves((params, batch)))
    return _quickly(lowered), known, [path_name(outs[k][0]) for k in kept]


def _quickly(lowered: Any) -> Callable[..., Any]:
    """The compiled program; which options there are differs between versions of XLA."""
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(_QUICK)
        except jax.errors.JaxRuntimeError:
            pass
    return lowered.compile()


_Trial = tuple[list[int], list[np.ndarray], list[np.ndarray]]


def _trials(run: Callable[..., Any], fixed: list[Any], batch: list[Shape]) -> list[_Trial]:
    """The rows of each change, and the outputs before and after it, for each draw.

    Two draws are enough for which the outputs of changed examples move.
    """
    trials: list[_Trial] = []
    alive = 0
    for draw in _DRAWS:
        same = jax.device_put([_made_up(x, draw, k) for k, x in enumerate(fixed)])
        inputs = [_examples(s, draw, k) for k, s in enumerate(batch)]
        before, *results = (
            list(map(np.asarray, run(*same, *(x[np.array(rows)] for x in inputs))))
            for rows in (_FIRST, *_CHANGES)
        )
        trials += [(rows, before, after) for rows, after in zip(_CHANGES, results, strict=True)]
        moved = [_change(a[1], b[1])[0] for a, b in zip(before, results[0], strict=True)]
        alive += any(0 < change < math.inf for change in moved)
        if alive == 2:
            break
    return trials


def _is_comparable(shape: Any) -> bool:
    is_number = not jnp.issubdtype(shape.dtype, jax.dtypes.extended)
    return is_number and shape.shape[:1] == (_COUNT,)


def _is_tracer(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _made_up(value: Any, draw: Draw, place: int) -> Any:
    """Made-up numbers for a shape; any other value stays."""
    if not isinstance(value, Shape):
        return value
    return _as_dtype(_numbers(value.shape, value.dtype, draw, place), value.dtype)


def _examples(shape: Shape, draw: Draw, place: int) -> Any:
    """The examples of a batch, and what they are changed into."""
    numbers = _numbers((2 * _COUNT, *shape.shape[1:]), shape.dtype, draw, -1 - place)
    if numbers.dtype == bool:
        numbers[_COUNT:] = ~numbers[:_COUNT]
    else:
        numbers[_COUNT:] *= 3.0  # a maximum moves, too
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
