"""Accuracy, the record of bias and variance, and iterations, beside numpy's count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from benchmarks.harness.measures import accuracy, bias_variance, iterations_to_tolerance
from tests.tables.small import CLASSES, INPUTS, OBJECTIVE, make_batch, make_params, network

LOSSES = kfgn.losses


def one_hot(batch):
    inputs, labels = batch
    return inputs, jax.nn.one_hot(labels, CLASSES, dtype=inputs.dtype)


def share(outputs, labels):
    return np.mean(np.argmax(np.asarray(outputs), axis=-1) == np.asarray(labels))


@pytest.mark.parametrize("count", [1, 7, 32, 40])
@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
def test_labels(count, chunk_size):
    """Whole chunks, a rest, and all in one are the same count."""
    params, batch = make_params(), make_batch(count=count)
    expected = share(network(params, batch[0]), batch[1])
    measure = accuracy(OBJECTIVE, chunk_size=chunk_size)
    # A count over a count, in float32: one rounding.
    np.testing.assert_allclose(measure(params, batch), expected, rtol=2e-7)
    np.testing.assert_allclose(jax.jit(measure)(params, batch), expected, rtol=2e-7)


def test_losses_count_in_their_own_way():
    """Distributions by their largest entry, logits by their sign, each output for itself."""
    params, batch = make_params(), make_batch(count=50)
    outputs, labels = network(params, batch[0]), batch[1]
    expected = share(outputs, labels)
    soft = kfgn.Objective(network, LOSSES.softmax_cross_entropy)
    np.testing.assert_allclose(accuracy(soft)(params, one_hot(batch)), expected, rtol=2e-7)
    targets = jnp.asarray(np.random.default_rng(0).uniform(size=(50, CLASSES)), jnp.float32)
    signs = kfgn.Objective(network, LOSSES.sigmoid_binary_cross_entropy)
    found = accuracy(signs)(params, (batch[0], targets))
    by_hand = np.mean((np.asarray(outputs) > 0) == (np.asarray(targets) > 0.5))
    assert 0.2 < by_hand < 0.8
    np.testing.assert_allclose(found, by_hand, rtol=2e-7)


def test_positions_of_an_example_share_its_count():
    """Several labels per example, as in a sequence."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(INPUTS, CLASSES)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(6, 5, INPUTS)), jnp.float32)
    labels = jnp.asarray(rng.integers(CLASSES, size=(6, 5)))
    objective = kfgn.Objective(
        lambda p, x: x @ p["kernel"], LOSSES.softmax_cross_entropy_with_integer_labels
    )
    found = accuracy(objective, chunk_size=4)({"kernel": kernel}, (inputs, labels))
    np.testing.assert_allclose(found, share(inputs @ kernel, labels), rtol=2e-7)


def test_own_notion_of_correct():
    """`correct=` where the loss has none of its own."""
    params, batch = make_params(), one_hot(make_batch(count=30))
    expected = share(network(params, batch[0]), np.argmax(batch[1], axis=1))
    squared = kfgn.Objective(network, LOSSES.half_squared_error)
    with pytest.raises(ValueError, match=r"squared_error.*correct="):
        accuracy(squared)
    found = accuracy(squared, correct=lambda o, t: o.argmax() == t.argmax())(params, batch)
    np.testing.assert_allclose(found, expected, rtol=2e-7)


@pytest.mark.usefixtures("x64")
def test_record_of_a_training():
    """Losses are the objective's without its penalty; a memorised set shows variance."""
    params = make_params(jnp.float64)
    train, dev = make_batch(jnp.float64, count=6), make_batch(jnp.float64, seed=9, count=40)
    measure = jax.jit(bias_variance(OBJECTIVE, chunk_size=16))
    points = [measure(params, train, dev)]
    # float64: sums of at most 40 terms in another order.
    np.testing.assert_allclose(points[0].train_loss, OBJECTIVE.mean_loss(params, train), rtol=1e-14)
    np.testing.assert_allclose(points[0].dev_loss, OBJECTIVE.mean_loss(params, dev), rtol=1e-14)
    free = kfgn.Objective(network, OBJECTIVE.loss)
    descend = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.5 * g, p, jax.grad(free)(p, train)))
    for _ in range(400):
        params = descend(params)
    points.append(measure(params, train, dev))
    record = jax.tree.map(lambda *x: jnp.stack(x), *points)
    assert record.bias.shape == (2,)
    assert record.bias[0] > 0 and record.bias[1] == 0
    np.testing.assert_allclose(record.variance[1], 1 - record.dev_accuracy[1], atol=0)
    assert record.variance[1] > 0.1


def test_what_is_not_finite_is_wrong():
    """argmax names the place of a NaN, which says nothing."""
    params, (inputs, labels) = make_params(), make_batch(count=8)
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), params)
    assert accuracy(OBJECTIVE)(broken, (inputs, 0 * labels)) == 0


def test_accuracy_leaves_out_ignored_labels():
    """Examples without a label count neither as right nor as wrong; masked classes do no harm."""
    loss = LOSSES.softmax_cross_entropy_with_integer_labels.with_options(ignore_index=-1)
    objective = kfgn.Objective(lambda p, x: p + x, loss)
    logits = jnp.asarray([[2.0, 0, -jnp.inf], [0, 2, -jnp.inf], [0, 0, 1]])
    measure = accuracy(objective)
    assert measure(jnp.zeros(()), (logits, jnp.asarray([0, 0, -1]))) == 0.5
    assert measure(jnp.zeros(()), (jnp.full((1, 3), jnp.nan), jnp.zeros(1, int))) == 0


def test_low_precision_is_counted_in_float32():
    """bfloat16 counts to 256 and no further."""
    params, batch = make_params(jnp.bfloat16), make_batch(jnp.bfloat16, count=700)
    found = accuracy(OBJECTIVE, chunk_size=300)(params, batch)
    assert found.dtype == jnp.float32
    expected = share(network(params, batch[0]).astype(jnp.float32), batch[1])
    np.testing.assert_allclose(found, expected, rtol=2e-7)


@pytest.mark.parametrize(
    ("losses", "tolerance", "expected"),
    [
        ([3.0, 2.0, 1.5, 1.49, 1.2], 0.1, 3),
        ([3.0, 2.0, 1.5], 1.0, 1),
        ([3.0, 2.0, 1.5], 0.1, None),
        ([2.0, 2.0], 0.0, 1),
        ([1.0, 1.25], 0.25, 1),  # upwards as well
        ([1.0], 10.0, None),
        ([np.inf, np.inf, 1.0, np.nan, np.nan, 2.0, 2.0], 0.5, 6),
    ],
)
def test_iterations_to_tolerance(losses, tolerance, expected):
    """Eq. (29) of Veitch: the first change that is small enough."""
    found = iterations_to_tolerance(losses, tolerance)
    assert found == expected and type(found) is type(expected)
    assert iterations_to_tolerance(np.asarray(losses), tolerance) == expected
