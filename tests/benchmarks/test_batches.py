"""Which examples the strategies give, and that a seed and a step say it all."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from benchmarks.harness.batches import draw_batches

EXAMPLES, SIZE = 23, 5
DATA = {"x": np.arange(EXAMPLES), "y": jnp.arange(EXAMPLES * 2).reshape(EXAMPLES, 2)}
PASS = EXAMPLES // SIZE


def drawn(count, *, part=0, **options):
    """The examples of the first pairs, as indices."""
    options = {"batch_size": SIZE, **options}
    pairs = itertools.islice(draw_batches(DATA, **options), count)
    return [tuple(int(i) for i in pair[part]["x"]) for pair in pairs]


def test_batches_are_rows_of_the_data():
    for batch, _ in itertools.islice(draw_batches(DATA, SIZE), 2 * PASS):
        assert batch["x"].shape == (SIZE,)
        np.testing.assert_array_equal(batch["y"][:, 0], 2 * batch["x"])


def test_fixed_batches_come_round():
    found = drawn(3 * PASS, strategy="fixed")
    assert found[:PASS] == found[PASS : 2 * PASS] == found[2 * PASS :]
    assert len({i for batch in found for i in batch}) == PASS * SIZE  # none twice in a pass


def test_reshuffled_batches_cover_the_data_anew():
    found = drawn(2 * PASS, strategy="reshuffled")
    for one in (found[:PASS], found[PASS:]):
        assert len({i for batch in one for i in batch}) == PASS * SIZE
    assert found[:PASS] != found[PASS:]
    assert found[0] != tuple(range(SIZE))


def test_repeated_batches_are_one_joint_batch():
    first, second = drawn(2, strategy="repeated", repeats=7)
    assert first == second and len(first) == 7 * SIZE
    parts = [first[k * SIZE : (k + 1) * SIZE] for k in range(7)]
    assert all(len(set(part)) == SIZE for part in parts)  # each without replacement
    assert len(set(first)) < len(first)  # but not all of them together


def test_joint_mean_is_the_mean_over_batches():
    (union, _), *_ = draw_batches(DATA, SIZE, strategy="repeated", repeats=4, steps=1)
    means = np.reshape(union["x"] ** 2, (4, SIZE)).mean(axis=1)
    assert np.mean(union["x"] ** 2) == pytest.approx(means.mean())


@pytest.mark.parametrize("strategy", ["fixed", "reshuffled"])
def test_repeats_join_successive_batches(strategy):
    single = drawn(6, strategy=strategy)
    assert drawn(3, strategy=strategy, repeats=2) == [
        a + b for a, b in zip(single[::2], single[1::2], strict=True)
    ]


def test_full_gives_the_data_themselves():
    for gradient, curvature in draw_batches(DATA, strategy="full", steps=2):
        assert gradient is DATA and curvature is DATA


@pytest.mark.parametrize("strategy", ["fixed", "reshuffled", "repeated", "full"])
def test_curvature_examples_are_some_of_the_batch(strategy):
    size = None if strategy == "full" else SIZE
    options = {"strategy": strategy, "batch_size": size, "curvature_size": 3}
    batches, subsets = drawn(8, **options), drawn(8, part=1, **options)
    for batch, subset in zip(batches, subsets, strict=True):
        assert len(set(subset)) == 3 and set(subset) <= set(batch)
    assert len(set(subsets)) > 1
    for gradient, curvature in draw_batches(DATA, size, strategy=strategy, steps=2):
        assert gradient is curvature


@pytest.mark.parametrize("strategy", ["fixed", "reshuffled", "repeated"])
def test_seed_and_step_say_it_all(strategy):
    options = {"strategy": strategy, "repeats": 2, "curvature_size": 4}
    for part in (0, 1):
        whole = drawn(9, part=part, **options)
        assert drawn(9, part=part, **options) == whole
        assert drawn(4, part=part, start=5, **options) == whole[5:]
        assert drawn(9, part=part, seed=1, **options) != whole


def test_steps_end_the_iterator():
    iterator = draw_batches(DATA, SIZE, start=3, steps=5)
    assert len(list(iterator)) == 2
    with pytest.raises(StopIteration):  # and stays so
        next(iterator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "random"}, "strategy must be one of"),
        ({"batch_size": None}, "needs a batch_size"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 23"),
        ({"batch_size": 24}, "batch_size must be a whole number from 1 to 23"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"repeats": 0}, "repeats must be"),
        ({"start": -1}, "start must be"),
        ({"seed": -1}, "seed must be"),
        ({"start": 4, "steps": 3}, "steps must be a whole number of at least 4"),
        ({"curvature_size": 6}, "curvature_size must be a whole number from 1 to 5"),
        ({"strategy": "full"}, "leave batch_size out"),
        ({"strategy": "full", "batch_size": None, "repeats": 2}, "takes all data once"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(kfgn.errors.OptionError, match=message):
        draw_batches(DATA, **{"batch_size": SIZE, **options})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "a pytree of arrays"),
        ((np.zeros(3), 1.0), "a pytree of arrays"),
        ((np.zeros(3), np.zeros(4)), r"differ in their number of examples: \[3, 4\]"),
        (np.zeros((0, 2)), "has no examples"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(kfgn.errors.BatchError, match=message):
        draw_batches(data, 1)
