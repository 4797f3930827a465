"""Which examples a solver sees: fixed, reshuffled or repeated batches, or all of them.

A solver that compares values of one step with those of the next (nonlinear
conjugate gradients, L-BFGS, a line search over several steps) needs batches
that stay what they are; a stochastic one does not (Veitch, section 3.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Int

from kfgn.base.checks import check_choice, check_whole
from kfgn.base.errors import BatchError, OptionError
from kfgn.base.types import PyTree

STRATEGIES = ("fixed", "reshuffled", "repeated", "full")
# What separates the draws of curvature examples from those of batches.
_CURVATURE = 1


def draw_batches(
    data: PyTree,
    batch_size: int | None = None,
    *,
    strategy: str = "reshuffled",
    repeats: int = 1,
    seed: int = 0,
    curvature_size: int | None = None,
    start: int = 0,
    steps: int | None = None,
) -> Iterator[tuple[PyTree, PyTree]]:
    """Pairs `(gradient_batch, curvature_batch)`, one for every step of a solver.

    The pairs depend on the seed and on the number of the step alone, so a run
    is resumed with `start=` at the step where it stopped, at no cost.

    Args:
      data: a pytree of arrays `[m, ...]`, such as `(inputs, targets)`.
      batch_size: b examples, drawn without replacement; not for "full".
      strategy: "fixed": the data are shuffled once into `m // b` batches, which
        come round in turn for ever. "reshuffled": every pass over the data has
        a shuffle of its own. "repeated": R batches are drawn once, each from
        all the data, and every step gets them all (eq. 28 of Veitch). "full":
        every step gets the data themselves.
      repeats: R, how many batches one step's examples are joined from, so that
        their mean loss is the mean over R batches, eq. (28). With "fixed" and
        "reshuffled" they are successive ones.
      seed: of all draws.
      curvature_size: how many of the gradient batch's examples, drawn anew at
        every step, are for the curvature; None for all, the same object.
      start: the number of the first step.
      steps: the number of the step to end before; None never ends.

    The `m mod b` examples that are left over of a shuffle are left out, so that
    all batches have one shape.

    Raises:
      BatchError: the data have no examples, or arrays that differ in their number.
      OptionError: an unknown strategy, or a number that does not fit the data.
    """
    count = _examples(data)
    check_choice("strategy", strategy, STRATEGIES)
    size = _batch_size(strategy, batch_size, count)
    check_whole("repeats", repeats, 1)
    check_whole("seed", seed, 0)
    check_whole("start", start, 0)
    if strategy == "full" and repeats != 1:
        raise OptionError('repeats is for drawn batches: strategy "full" takes all data once')
    if steps is not None:
        check_whole("steps", steps, start)
    joined = size * repeats
    if curvature_size is not None:
        check_whole("curvature_size", curvature_size, 1, joined)
    indices = None if strategy == "full" else _draws(strategy, count, size, repeats, seed)

    def generate() -> Iterator[tuple[PyTree, PyTree]]:
        for step in itertools.count(start) if steps is None else range(start, steps):
            gradient = data if indices is None else _take(data, indices(step))
            if curvature_size is None:
                yield gradient, gradient
                continue
            generator = np.random.default_rng([seed, step, _CURVATURE])
            chosen = generator.choice(joined, curvature_size, replace=False)
            yield gradient, _take(gradient, np.sort(chosen))

    return generate()


def _draws(
    strategy: str, count: int, size: int, repeats: int, seed: int
) -> Callable[[int], Int[np.ndarray, " R_b"]]:
    """`step -> indices`; the last shuffle is kept, for the steps within one pass."""
    each = count // size
    kept: dict[int, np.ndarray] = {}

    def shuffle(number: int) -> np.ndarray:
        if number not in kept:
            kept.clear()
            kept[number] = np.random.default_rng([seed, number]).permutation(count)
        return kept[number]

    if strategy == "repeated":
        union = np.concatenate([shuffle(r)[:size] for r in range(repeats)])
        return lambda step: union

    def batch(number: int) -> np.ndarray:
        passed, place = divmod(number, each)
        order = shuffle(0 if strategy == "fixed" else passed)
        return order[place * size : (place + 1) * size]

    return lambda step: np.concatenate([batch(step * repeats + r) for r in range(repeats)])


def _take(data: PyTree, indices: np.ndarray) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[indices], data)


def _examples(data: PyTree) -> int:
    """The number of examples, m."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data)]
    if not shapes or any(not shape for shape in shapes):
        raise BatchError(
            "data must be a pytree of arrays with a leading axis of examples, found leaves of "
            f"shapes {shapes}"
        )
    counts = sorted({shape[0] for shape in shapes})
    if len(counts) > 1:
        raise BatchError(f"the arrays of data differ in their number of examples: {counts}")
    if counts[0] == 0:
        raise BatchError("data has no examples: expected at least one")
    return counts[0]


def _batch_size(strategy: str, batch_size: int | None, count: int) -> int:
    if strategy == "full":
        if batch_size not in (None, count):
            raise OptionError(
                f'strategy "full" takes all {count} examples; leave batch_size out, '
                f"found {batch_size!r}"
            )
        return count
    if batch_size is None:
        raise OptionError(f"strategy {strategy!r} needs a batch_size")
    check_whole("batch_size", batch_size, 1, count)
    return batch_size
