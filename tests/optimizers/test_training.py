"""Methods train a transformer, a ResNet, a GRU and a U-Net by the recipe.

The whole path runs here: a model with layers of many kinds, its factors, the
recipe with its default options, and updates in float32. That factors are right
is tested elsewhere: with these dampings a wrong one would train as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import kfgn
from tests.tables.training_models import TRAINING, Training

STEPS = 20
FALLS_TO = 0.7  # of the initial loss

# KFRA goes back through every architecture; the others go back by transposition, which is
# jax's, and differ in the columns they start from. How uses of a kernel are shared enters
# the factors alone.
RUNS = [
    *((name, "kfra", "expand") for name in TRAINING),
    ("unet", "kflr", "expand"),
    ("resnet", "kfac", "expand"),
    ("transformer", "kfac", "reduce"),
    ("gru", "empirical", "expand"),
]


class Setting(NamedTuple):
    """A model with its objective, which is made once for all methods."""

    training: Training
    objective: kfgn.Objective
    loss: Callable[..., jax.Array]


@functools.cache
def setting(name: str) -> Setting:
    training = TRAINING[name]()
    objective = kfgn.Objective(training.model, training.loss)
    return Setting(training, objective, jax.jit(objective))


def make_step(
    objective: kfgn.Objective, tx: optax.GradientTransformation, method: str, sharing: str
) -> Callable[..., Any]:
    """`(params, state, batch, key) -> (params, state, value)`, as in the README."""
    curvature_fn = kfgn.value_grad_and_curvature(objective, method, sharing=sharing)

    def step(params, state, batch, key):
        (value, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    return step


def optimizer(
    method: str, objective: kfgn.Objective, params: Any, batch: Any
) -> optax.GradientTransformation:
    """The method's alias, or for "empirical", which has none, the same of its parts."""
    if method != "empirical":
        return getattr(kfgn, method)(objective, params, batch)
    blocks = kfgn.layers.find_blocks(objective, params, batch)
    return optax.chain(kfgn.transforms.scale_by_curvature(blocks), optax.scale(-0.9))


@pytest.mark.parametrize(("name", "method", "sharing"), RUNS)
def test_loss_falls(name, method, sharing):
    (_, params, batch, _), objective, loss = setting(name)
    tx = optimizer(method, objective, params, batch)
    step, state, losses = jax.jit(make_step(objective, tx, method, sharing)), tx.init(params), []
    for k in range(STEPS):
        key = jax.random.key(k) if method == "kfac" else None
        params, state, value = step(params, state, batch, key)
        losses.append(float(value))
    losses.append(float(loss(params, batch)))
    assert np.isfinite(losses).all(), losses
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0
    assert losses[-1] < FALLS_TO * losses[0], losses
