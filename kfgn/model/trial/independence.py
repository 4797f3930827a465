"""Whether a model on a batch is the model on each of its examples.

Curvature is a sum over examples, so it is traced on one of them. For a model
whose examples meet, as in a batch normalization by the batch's own statistics,
or whose outputs depend on the batch's size or on the position in it, as with
noise drawn for the whole batch, that would be the curvature of another
function. Most models tell by their operations that they are none of these. Any
other is run on made-up values: some examples are changed, and the outputs of
the others must stay; some are left out, and those of the others must stay, too.
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
from kfgn.model.program.equations import abstract
from kfgn.model.trial.batch_noise import coarsest, draws_for_batch
from kfgn.model.trial.batch_program import Program, compile_model, trace_model
from kfgn.model.trial.made_up import (
    COUNT,
    DRAWS,
    MANY,
    Draw,
    Shape,
    Values,
    examples,
    made_up,
    on_host,
    on_made_up_values,
    real_values,
    shaken_value,
)
from kfgn.model.trial.moved import Outputs, change_of, moved, moved_beside, output_name
from kfgn.model.trial.separate import acts_alone

# Three examples, and three more that they are changed into. Changing the one in
# the middle is seen where examples meet in pairs or on average, changing those
# around it where all look at the first or at the last.
_FIRST = [0, 1, 2]
_CHANGES = ([0, 4, 2], [3, 1, 5])
# Those that are left in smaller batches.
_SMALLER = ([0], [1], [2], [1, 2])

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
      params: its parameters (arrays, tracers or `jax.ShapeDtypeStruct`).
      inputs: a batch of inputs. Where all have values, these are tried as well.
      function: what of the model is run, known by its name; None for all of it.
      axis_name: the axis of examples, whose collectives are constants in `function`.
    """
    shapes = jax.tree.map(lambda a: abstract(a, a.shape), params)
    example = jax.tree.map(lambda a: abstract(a, a.shape[1:]), inputs)
    leaves, tree = jax.tree.flatten((shapes, example))
    known, name = _signatures(model), getattr(function, "__qualname__", None)
    signature = (tree, tuple((s.shape, s.dtype) for s in leaves), axis_name, name)
    if signature in known:
        return
    with on_made_up_values():
        with jax.ensure_compile_time_eval():  # also where they are constants of a trace
            real = real_values(params, inputs)
        found = _dependence(function or model, shapes, example, axis_name is not None, real)
    if found is not None:
        raise ModelError(found)
    known.add(signature)


def has_passed(model: Any) -> bool:
    """Whether a model was found to act on each example alone, for some shapes."""
    return bool(_signatures(model))


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


def _dependence(
    model: Callable, params: PyTree, example: PyTree, named: bool, real: Values | None
) -> str | None:
    """What an example's outputs depend on beside it, in words."""
    try:
        traced = {COUNT: trace_model(model, params, example, COUNT)}
        for count in (1, 2):
            with contextlib.suppress(Exception):  # the trace on one example tells what is wrong
                traced[count] = trace_model(model, params, example, count)
        known = [t.closed for t in traced.values()]
        places = [*(None for _ in jax.tree.leaves(params)), *(0 for _ in jax.tree.leaves(example))]
        if len(traced) == 3 and acts_alone(known, list(traced), places):
            return None
        programs = {COUNT: compile_model(traced.pop(COUNT))}
        for count, smaller in traced.items():
            with contextlib.suppress(Exception):
                programs[count] = compile_model(smaller)
        # The values are no part of a trace that this may be called in.
        with jax.ensure_compile_time_eval():
            shapes = jax.tree.leaves(params), jax.tree.leaves(example)
            trials = list(_trials(programs, *shapes, named, real))
    except Exception:  # likewise: what fails on made-up values is let pass
        return None
    whole = programs[COUNT].jaxpr
    draws = draws_for_batch(whole, whole.invars)
    found = next(filter(None, map(_influence, trials)), None)
    if found is None and draws:
        found = _shuffled(model, params, example)
    if found is not None:
        return (
            f"the examples of a batch are not independent: {found}. kfgn needs a model that "
            f"acts on each example alone: {_STATISTICS[named]}, and make other operations act "
            "within an example."
        )
    if named and not draws:
        return None  # it is run on batches of one
    tolerance = coarsest(p.jaxpr for p in programs.values()) ** 0.5
    seen = [(trial, words) for trial in trials if (words := _difference(trial, tolerance))]
    # What depends on the size shows with any values; roundoff of saturated units with some.
    if len(seen) < min(2, len(trials)) or not seen:
        return None
    trial, found = seen[0]
    return found + _remedy(trial, tolerance, programs[COUNT])


# What to do about statistics of the batch: without an axis of examples, and with one.
_STATISTICS = (
    'give batch normalization an axis, kfgn.Objective(model, loss, axis_name="batch") with '
    'BatchNorm(..., axis_name="batch") in the model, or frozen statistics '
    "(use_running_average=True, or eval() in nnx)",
    "under Objective(axis_name=...) every normalization needs that axis_name, and the model no "
    "jax.vmap of that name, for kfgn runs it under one, a batch of one example at a time",
)


class _Trial(NamedTuple):
    """Outputs for one draw of made-up values."""

    values: str  # which
    together: Outputs  # of examples 0, 1, 2
    changed: list[tuple[list[int], Outputs]]  # with the rows of each change
    repeated: Outputs  # of example 0, three times
    shaken: Outputs  # as together, with roundoff in all that the model is given
    smaller: list[tuple[list[int], Outputs]]  # of fewer examples


def _influence(trial: _Trial) -> str | None:
    """Which outputs moved when the input of others was changed, in words."""
    for rows, after in trial.changed:
        changed = [k for k in _FIRST if rows[k] != k]
        if found := moved_beside(changed, trial.together, after, trial.values):
            return found
    return None


def _shuffled(model: Callable, params: PyTree, example: PyTree) -> str | None:
    """`_influence` of a model that draws for its batch: of three a permutation may move none."""
    try:
        program = compile_model(trace_model(model, params, example, MANY))
        with jax.ensure_compile_time_eval():
            given = [made_up(x, DRAWS[0], k) for k, x in enumerate(jax.tree.leaves(params))]
            fixed = [*_made_up_known(program, DRAWS[0], len(given)), *given]
            data = [examples(s, DRAWS[0], k) for k, s in enumerate(jax.tree.leaves(example))]
            first = np.arange(MANY) % COUNT

            def of(rows: np.ndarray) -> Outputs:
                found = program.run(*fixed, *(x[rows] for x in data))
                return dict(zip(program.names, map(np.asarray, found), strict=True))

            before = of(first)
            ways = (
                moved_beside(
                    [k], before, of(first + COUNT * (np.arange(MANY) == k)), "made-up values"
                )
                for k in range(MANY)
            )
            return next(filter(None, ways), None)
    except Exception:  # as in `_dependence`
        return None


def _difference(trial: _Trial, tolerance: float) -> str | None:
    """Which outputs are others in a smaller batch, in words."""
    for rows, outputs in trial.smaller:
        for name, b in outputs.items():
            if name not in trial.together or not jnp.issubdtype(b.dtype, jnp.inexact):
                continue
            for place, k in enumerate(rows):
                change, scale = change_of(trial.together[name][k], b[place])
                # Whether a singular matrix has an inverse is roundoff's, too.
                if math.inf > change > (tolerance + _roundoff(trial, name)) * (scale or 1):
                    return (
                        "the model on a batch is not the model on each of its examples alone: "
                        f"with {trial.values}, {output_name(name)} of example {k} "
                        f"{moved(change, scale)} when of {COUNT} examples {len(rows)} "
                        "remained. "
                    )
    return None


def _roundoff(trial: _Trial, name: str) -> float:
    """What roundoff may change in an output, relatively and generously; an inverse magnifies it."""
    pairs = zip(trial.together[name], trial.shaken[name], strict=True)
    found = max(
        (change / (scale or 1) for change, scale in itertools.starmap(change_of, pairs)),
        default=0.0,
    )
    return 30 * found if 30 * found < 1 else math.inf


def _remedy(trial: _Trial, tolerance: float, program: Program) -> str:
    """Why outputs differ between sizes of the batch, as far as can be seen, and what helps."""
    rows = [(x[0], x[k]) for x in trial.repeated.values() for k in (1, 2)]
    if all(change <= tolerance * scale for change, scale in itertools.starmap(change_of, rows)):
        return (
            "The model depends on the size of the batch, as in `x / x.shape[0]`: take sums and "
            "means over the batch in the loss, which is averaged over examples, not in the model."
        )
    if draws_for_batch(program.jaxpr, program.jaxpr.invars):
        return (
            "It draws noise for the whole batch with one key that it closes over. Give every "
            "example a key among the inputs, `inputs = (x, jax.random.split(key, len(x)))`, and "
            "draw for each example alone in the model, "
            "`jax.vmap(lambda key, x: jax.random.bernoulli(key, 0.5, x.shape))(keys, x)`. Inside "
            "of a `while_loop` or a function with a derivative rule it is enough to draw before it."
        )
    return (
        "The model depends on an example's position in the batch, as in `x * jnp.arange(len(x))` "
        "or a constant with a row per example: pass such numbers among the inputs."
    )


def _trials(
    programs: dict[int, Program],
    params: list[Shape],
    example: list[Shape],
    named: bool,
    real: Values | None,
) -> Iterator[_Trial]:
    """A trial for each draw; two are enough for which outputs of changed examples move."""

    def with_key(data: list[Any]) -> list[Any]:
        """Under a named axis, where a model takes the key of its one example, all have one key."""
        keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and named for x in data]
        return [x[np.zeros(2 * COUNT, int)] if k else x for x, k in zip(data, keys, strict=True)]

    alive = 0
    if real is not None:
        with contextlib.suppress(Exception):  # they may be where the programs cannot run
            yield _trial(programs, "the values given", DRAWS[0], real[0], with_key(real[1]))
    for draw in DRAWS:
        leaves = [made_up(x, draw, k) for k, x in enumerate(params)]
        data = with_key([examples(s, draw, k) for k, s in enumerate(example)])
        trial = _trial(programs, "made-up values", draw, leaves, data)
        yield trial
        after = trial.changed[0][1]
        changes = [change_of(a[1], after[name][1])[0] for name, a in trial.together.items()]
        alive += any(0 < change < math.inf for change in changes)
        if alive == 2:
            return


def _trial(
    programs: dict[int, Program], values: str, draw: Draw, leaves: list[Any], inputs: list[Any]
) -> _Trial:
    """The outputs of some examples, and of what becomes of them; the draw is of what is traced."""
    known = {n: _made_up_known(p, draw, len(leaves)) for n, p in programs.items()}
    shaken = (
        {COUNT: list(map(shaken_value, [*known[COUNT], *leaves]))},
        list(map(shaken_value, inputs)),
    )
    known, leaves = jax.device_put((known, leaves))
    fixed = {n: [*known[n], *leaves] for n in programs}
    follow = set[str].intersection(*(set(p.names) for n, p in programs.items() if n > 1))

    def of(rows: list[int], fixed: Any = fixed, inputs: Any = inputs) -> Outputs:
        program = programs[len(rows)]
        found = program.run(*fixed[len(rows)], *(x[np.array(rows)] for x in inputs))
        named = zip(program.names, found, strict=True)
        return {name: np.asarray(x) for name, x in named if name in follow}

    together, changed = of(_FIRST), [(rows, of(rows)) for rows in _CHANGES]
    smaller = [(rows, of(rows)) for rows in _SMALLER if len(rows) in programs]
    return _Trial(values, together, changed, of([0, 0, 0]), of(_FIRST, *shaken), smaller)


def _made_up_known(program: Program, draw: Draw, start: int) -> list[Any]:
    """What a program closes over; what is traced is made up, alike for all sizes of the batch."""
    place = itertools.count(start)
    known = [made_up(x, draw, next(place) if isinstance(x, Shape) else 0) for x in program.known]
    return list(map(on_host, known))
