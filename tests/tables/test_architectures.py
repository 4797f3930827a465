"""The table of architectures keeps its promises: names, sizes, independence, dependence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.base.trees import named_leaves
from tests.tables.architectures import ROWS
from tests.tables.row_truth import setting, truth
from tests.tables.training_models import TRAINING


def every_row(test: Callable) -> Callable:
    """Parametrises by all rows, in float64 and with the promotion that a row needs."""
    test = pytest.mark.usefixtures("x64", "promotion")(test)
    return pytest.mark.parametrize("name", ROWS)(test)


MOST_PARAMETERS, MOST_OUTPUTS = 150, 4
AXES = {"scalar": 1, "vector": 2, "pooled": 2, "sequence": 3, "image": 4}


@pytest.fixture
def promotion(request: pytest.FixtureRequest, strict_dtypes: None) -> Iterator[None]:
    """Strict dtypes, except for the rows that say they cannot have them."""
    with jax.numpy_dtype_promotion(ROWS[request.getfixturevalue("name")].promotion):
        yield


@every_row
def test_parameters(name):
    """Named as the row says, few, of the dtype it says and nowhere near zero."""
    row = ROWS[name]
    leaves = named_leaves(setting(name).case.params)
    covered = [path for paths in row.expected.values() for path in paths] + list(row.unassigned)
    assert sorted(covered) == sorted(leaves)
    assert set(row.flat) <= set(leaves)
    assert sum(leaf.size for leaf in leaves.values()) <= MOST_PARAMETERS
    for path, leaf in leaves.items():
        assert leaf.dtype == row.dtype, path
        assert np.min(np.abs(leaf)) > 0.1, path
    again = named_leaves(row.case().params)
    assert all(np.array_equal(leaf, again[path]) for path, leaf in leaves.items())


@every_row
def test_block_names(name):
    """A block has its kernel's path without the last component, where that is unique."""
    expected = ROWS[name].expected
    short = {block: paths[0].rpartition("/")[0] for block, paths in expected.items()}
    times = Counter(short.values())
    for block, paths in expected.items():
        unique = short[block] and times[short[block]] == 1
        assert block == (short[block] if unique else paths[0])


@every_row
def test_outputs(name):
    """Of the kind the row says, finite, real, and few unless positions have outputs each."""
    row, outputs, targets = ROWS[name], truth(name).outputs, setting(name).batch[1]
    for leaf in jax.tree.leaves(outputs):
        assert leaf.dtype == row.dtype
        assert leaf.shape[0] == 3
        assert np.all(np.isfinite(leaf))
    count = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))
    assert row.output in ("sequence", "image") or count <= MOST_OUTPUTS
    if row.output == "tree":
        assert len(jax.tree.leaves(outputs)) > 1
    else:
        assert outputs.ndim == AXES[row.output]
    assert jax.tree.map(jnp.shape, targets) == jax.tree.map(jnp.shape, outputs)
    assert truth(name).losses.shape == (3,)
    assert np.all(np.isfinite(truth(name).losses))


@every_row
def test_examples_are_independent(name):
    """An example has the same outputs alone, and not those of another."""
    found = truth(name)
    for together, alone in zip(
        jax.tree.leaves(found.outputs), jax.tree.leaves(found.alone), strict=True
    ):
        bound = ROWS[name].tolerance * np.max(np.abs(together))
        np.testing.assert_allclose(together, alone, rtol=0, atol=bound)
        assert np.max(np.abs(together[0] - together[1])) > 1e-3


@every_row
def test_outputs_depend_on_every_parameter(name):
    """But for those that the row calls flat, whose derivatives are rounding."""
    jacobian, start = truth(name).jacobian, 0
    for path, leaf in named_leaves(setting(name).case.params).items():
        own = jacobian[:, :, start : start + leaf.size]
        largest, start = np.max(np.abs(own)), start + leaf.size
        is_flat = path in ROWS[name].flat
        assert largest < ROWS[name].tolerance if is_flat else largest > 1e-4, path


@pytest.mark.parametrize("name", TRAINING)
def test_training_models_learn(name):
    """In float32, and Adam halves the loss that they begin with."""
    model, params, (inputs, targets), loss = TRAINING[name]()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves((inputs, targets))} == {32}
    objective = kfgn.Objective(model, loss)
    optimizer = optax.adam(2e-2)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(objective.mean_loss)(params, (inputs, targets))
        with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
            updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), None, 60))
    values = np.asarray(run(params)[1])
    assert np.all(np.isfinite(values))
    assert values[-1] < 0.5 * values[0], (values[0], values[-1])
