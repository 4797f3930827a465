"""Whether a model on a batch is the model on each of its examples.

Curvature is a sum over examples, so it is traced on one of them. For a model
whose examples meet, as in a batch normalization by the batch's own statistics,
or whose outputs depend on the batch's size or on the position in it, as with
noise drawn for the whole batch, that would be the curvature of another
function. Such a model is found by running it on made-up values: some examples
are changed, and the outputs of the others must stay; some are left out, and
those of the others must stay, too.
"""

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.errors import ModelError
from kfgn.base.types import PyTree
from kfgn.model.batch_noise import coarsest, draws_for_batch
from kfgn.model.batch_program import Program, compile_model
from kfgn.model.equations import abstract

Shape = jax.ShapeDtypeStruct
Draw = Callable[[np.ndarray], np.ndarray]

# Three examples, and three more that they are changed into. Changing the one in
# the middle is seen where examples meet in pairs or on average, changing those
# around it where all look at the first or at the last.
_COUNT = 3
_FIRST = [0, 1, 2]
_CHANGES = ([0, 4, 2], [3, 1, 5])
# Those that are left in smaller batches.
_SMALLER = ([0], [1], [2], [1, 2])

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
    model: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    inputs: PyTree,
    function: Callable[[PyTree, PyTree], PyTree] | None = None,
    axis_name: Hashable | None = None,
) -> None:
    """Raises ModelError if an example's outputs depend on more than the example.

    Other examples of the batch, its size, and the example's position must make
    no difference: kfgn reads the model on a batch of one. A model that fails on
    a batch of made-up values is let pass.

    Args:
      model: `(params, inputs) -> outputs`.
      params: its parameters; only their shapes matter (arrays, tracers or
        `jax.ShapeDtypeStruct`).
      inputs: a batch of inputs; only shapes matter, and not the batch's size.
      function: what of the model is run; None for all of it.
      axis_name: the axis of examples, whose collectives are constants in `function`.
    """
    shapes = jax.tree.map(lambda a: abstract(a, a.shape), params)
    example = jax.tree.map(lambda a: abstract(a, a.shape[1:]), inputs)
    leaves, tree = jax.tree.flatten((shapes, example))
    known = _signatures(model)
    signature = (tree, tuple((s.shape, s.dtype) for s in leaves), axis_name, function is None)
    if signature in known:
        return
    # Made-up values may leave a function's domain, which is no bug to search for, and
    # that they are put on a device is no transfer of the user's. Batches of different
    # sizes are compared to roundoff.
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.default_matmul_precision("highest"),
    ):
        found = _dependence(function or model, shapes, example, _STATISTICS[axis_name is None])
    if found is not None:
        raise ModelError(found)
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


def _dependence(model: Callable, params: PyTree, example: PyTree, remedy: str) -> str | None:
    """What an example's outputs depend on beside it, in words."""
    try:
        programs = {_COUNT: compile_model(model, params, example, _COUNT)}
        for count in (1, 2):
            with contextlib.suppress(Exception):  # the trace on one example tells what is wrong
                programs[count] = compile_model(model, params, example, count)
        # The values are no part of a trace that this may be called in.
        with jax.ensure_compile_time_eval():
            trials = list(_trials(programs, jax.tree.leaves(params), jax.tree.leaves(example)))
    except Exception:  # likewise: what fails on made-up values is let pass
        return None
    for trial in trials:
        if (found := _influence(trial)) is not None:
            return (
                f"the examples of a batch are not independent: {found}. kfgn needs a model that "
                f"acts on each example alone: {remedy}, and make other operations act within an "
                "example."
            )
    tolerance = coarsest(p.jaxpr for p in programs.values()) ** 0.5
    seen = [(trial, words) for trial in trials if (words := _difference(trial, tolerance))]
    # What depends on the size shows with any values; roundoff of saturated units with some.
    if len(seen) < min(2, len(trials)) or not seen:
        return None
    trial, found = seen[0]
    return found + _remedy(trial, tolerance, programs[_COUNT])


# What to do about statistics of the batch: with an axis of examples, and without.
_STATISTICS = (
    "under Objective(axis_name=...) every normalization needs that axis_name, and the model no "
    "jax.vmap of that name, for kfgn runs it under one, a batch of one example at a time",
    'give batch normalization an axis, kfgn.Objective(model, loss, axis_name="batch") with '
    'BatchNorm(..., axis_name="batch") in the model, or frozen statistics '
    "(use_running_average=True, or eval() in nnx)",
)

Outputs = dict[str, np.ndarray]


class _Trial(NamedTuple):
    """Outputs for one draw of made-up values."""

    together: Outputs  # of examples 0, 1, 2
    changed: list[tuple[list[int], Outputs]]  # with the rows of each change
    repeated: Outputs  # of example 0, three times
    shaken: Outputs  # as together, with roundoff in all that the model is given
    smaller: list[tuple[list[int], Outputs]]  # of fewer examples


def _influence(trial: _Trial) -> str | None:
    """Which outputs moved when one example was changed, in words."""
    for rows, after in trial.changed:
        for name, a in trial.together.items():
            for k in set(rows).intersection(_FIRST):
                change, scale = _change(a[k], after[name][k])
                if change > _tolerance(a.dtype) * scale:
                    return (
                        f"with made-up values, {_output(name)} of example {k} "
                        f"{_moved(change, scale)} when the input of {_named(rows)} alone was "
                        "changed"
                    )
    return None


def _difference(trial: _Trial, tolerance: float) -> str | None:
    """Which outputs are others in a smaller batch, in words."""
    for rows, outputs in trial.smaller:
        for name, b in outputs.items():
            if name not in trial.together or not jnp.issubdtype(b.dtype, jnp.inexact):
                continue
            for place, k in enumerate(rows):
                change, scale = _change(trial.together[name][k], b[place])
                # Whether a singular matrix has an inverse is roundoff's, too.
                if math.inf > change > (tolerance + _roundoff(trial, name)) * (scale or 1):
                    return (
                        "the model on a batch is not the model on each of its examples alone: "
                        f"with made-up values, {_output(name)} of example {k} "
                        f"{_moved(change, scale)} when of {_COUNT} examples {len(rows)} "
                        "remained. "
                    )
    return None


def _roundoff(trial: _Trial, name: str) -> float:
    """What roundoff may change in an output, relatively and generously; an inverse magnifies it."""
    pairs = zip(trial.together[name], trial.shaken[name], strict=True)
    found = max(
        (change / (scale or 1) for change, scale in itertools.starmap(_change, pairs)), default=0.0
    )
    return 30 * found if 30 * found < 1 else math.inf


def _remedy(trial: _Trial, tolerance: float, program: Program) -> str:
    """Why outputs differ between sizes of the batch, as far as can be seen, and what helps."""
    rows = [(x[0], x[k]) for x in trial.repeated.values() for k in (1, 2)]
    if all(change <= tolerance * scale for change, scale in itertools.starmap(_change, rows)):
        return (
            "The model depends on the size of the batch, as in `x / x.shape[0]`: take sums and "
            "means over the batch in the loss, which is averaged over examples, not in the model."
        )
    if draws_for_batch(program.jaxpr, program.jaxpr.invars):
        return (
            "It draws noise for the whole batch with one key that it closes over. Give every "
            "example a key among the inputs, `inputs = (x, jax.random.split(key, len(x)))`, and "
            "draw for each example alone in the model, "
            "`jax.vmap(lambda key, x: jax.random.bernoulli(key, 0.5, x.shape))(keys, x)`."
        )
    return (
        "The model depends on an example's position in the batch, as in `x * jnp.arange(len(x))` "
        "or a constant with a row per example: pass such numbers among the inputs."
    )


def _output(name: str) -> str:
    return f"output {name!r}" if name else "the output"


def _moved(change: float, scale: float) -> str:
    finite = f"moved by {change:.2g} (it reaches {scale:.2g})"
    return finite if change < math.inf else "turned finite or not"


def _named(rows: list[int]) -> str:
    changed = [str(k) for k in _FIRST if rows[k] != k]
    return f"example{'s' * (len(changed) > 1)} {' and '.join(changed)}"


def _trials(
    programs: dict[int, Program], params: list[Shape], example: list[Shape]
) -> Iterator[_Trial]:
    """A trial for each draw; two draws are enough for which outputs of changed examples move."""
    alive = 0
    for draw in _DRAWS:
        leaves = jax.device_put([_made_up(x, draw, k) for k, x in enumerate(params)])
        inputs = [_examples(s, draw, k) for k, s in enumerate(example)]
        fixed = {n: [*_made_up_known(p, draw, len(params)), *leaves] for n, p in programs.items()}

        def of(rows: list[int], fixed: Any = fixed, inputs: Any = inputs) -> Outputs:
            program = programs[len(rows)]
            values = program.run(*fixed[len(rows)], *(x[np.array(rows)] for x in inputs))
            return dict(zip(program.names, map(np.asarray, values), strict=True))

        shaken = {_COUNT: list(map(_shaken, fixed[_COUNT]))}, list(map(_shaken, inputs))

        together, changed = of(_FIRST), [(rows, of(rows)) for rows in _CHANGES]
        smaller = [(rows, of(rows)) for rows in _SMALLER if len(rows) in programs]
        yield _Trial(together, changed, of([0, 0, 0]), of(_FIRST, *shaken), smaller)
        after = changed[0][1]
        moved = [_change(a[1], after[name][1])[0] for name, a in together.items()]
        alive += any(0 < change < math.inf for change in moved)
        if alive == 2:
            return


def _shaken(value: Any) -> Any:
    """Floats with an error of some roundoff, other values as they are."""
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    signs = np.sign(_numbers(value.shape, value.dtype, lambda x: x, 7))
    return (value * (1 + 4 * float(jnp.finfo(value.dtype).eps) * signs)).astype(value.dtype)


def _made_up_known(program: Program, draw: Draw, start: int) -> list[Any]:
    """What a program closes over; what is traced is made up, alike for all sizes of the batch."""
    place = itertools.count(start)
    return jax.device_put(
        [_made_up(x, draw, next(place) if isinstance(x, Shape) else 0) for x in program.known]
    )


def _made_up(value: Any, draw: Draw, place: int) -> Any:
    """Made-up numbers for a shape, smaller the more of them are summed; other values stay."""
    if not isinstance(value, Shape):
        return value
    numbers = _numbers(value.shape, value.dtype, draw, place)
    if jnp.issubdtype(value.dtype, jnp.inexact) and len(value.shape) > 1:
        numbers = numbers * min(1.0, 2 / math.sqrt(max(1, math.prod(value.shape[:-1]))))
    return _as_dtype(numbers, value.dtype)


def _examples(shape: Shape, draw: Draw, place: int) -> Any:
    """The examples of a batch, and what they are changed into."""
    numbers = _numbers((2 * _COUNT, *shape.shape), shape.dtype, draw, -1 - place)
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
