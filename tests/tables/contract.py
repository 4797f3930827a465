"""What every transformation keeps to, alone and inside optax's wrappers: checks for two tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, assert_close, make_batch, make_params

UPDATES = 20

descend = functools.partial(optax.scale, -1.0)


def only_curvature(params: Any, batch: Any, curvature: Any) -> dict[str, Any]:
    """The keyword arguments of `update` that kfgn's optimizers read."""
    return {"curvature": curvature}


class Case(NamedTuple):
    make: Callable[[], optax.GradientTransformation]
    method: str = "kfra"
    falls_to: float = 0.9  # of the initial loss
    strict: bool = True  # False where optax itself promotes dtypes implicitly
    keywords: Callable[[Any, Any, Any], dict[str, Any]] = only_curvature


class Record(NamedTuple):
    """What happened in a short training."""

    tx: optax.GradientTransformation
    update: Callable[..., Any]  # compiled: (grads, state, params, keywords)
    losses: list[float]  # on one batch, before every update and after the last
    calls: list[tuple[Any, Any]]  # the arguments and results of every update
    traces: int


def by_layer(**labels: Any) -> Callable[[Any], Any]:
    """A label for every parameter of a layer."""
    return lambda params: {
        name: dict.fromkeys(layer, labels[name]) for name, layer in params.items()
    }


@functools.cache
def curvature_of(method: str) -> Callable[..., Any]:
    name, _, inverse = method.partition(" ")
    options = {"inverse": inverse} if inverse else {}
    return jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE, name, **options))


def measure(method: str, params: Any, batch: Any, update: int = 0) -> Any:
    key = {"key": jax.random.key(update)} if method == "kfac" else {}
    return curvature_of(method)(params, batch, **key)


@functools.cache
def loss_of() -> Callable[..., Any]:
    return jax.jit(OBJECTIVE)


def train(case: Case, updates: int = UPDATES) -> Record:
    """Trains on three batches in turn."""
    tx, traces = case.make(), []

    @jax.jit
    def update(grads, state, params, keywords):
        traces.append(1)
        return tx.update(grads, state, params, **keywords)

    params, batches = make_params(), [make_batch(seed=seed) for seed in range(3)]
    state, losses, calls = tx.init(params), [], []
    for k in range(updates):
        losses.append(float(loss_of()(params, batches[0])))
        batch = batches[k % 3]
        (_, grads), curvature = measure(case.method, params, batch, k)
        arguments = (grads, state, params, case.keywords(params, batch, curvature))
        changes, state = update(*arguments)
        calls.append((arguments, (changes, state)))
        params = optax.apply_updates(params, changes)
    losses.append(float(loss_of()(params, batches[0])))
    return Record(tx, update, losses, calls, len(traces))


def parametrize(cases: dict[str, Case]) -> pytest.MarkDecorator:
    """A test for every case, by its `name`."""
    loose = pytest.mark.loose_dtypes
    names = [n if case.strict else pytest.param(n, marks=loose) for n, case in cases.items()]
    return pytest.mark.parametrize("name", names)


# The checks.


def check_loss_falls(record: Record, falls_to: float) -> None:
    assert np.isfinite(record.losses).all()
    assert record.losses[-1] < falls_to * record.losses[0]


def check_structure_is_stable(record: Record) -> None:
    like_params = jax.tree.map(lambda p: (p.shape, p.dtype), make_params())
    layout = jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), record.calls[0][0][1])
    for _, (updates, state) in record.calls:
        assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == like_params
        assert jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), state) == layout


def check_state_is_named_tuples_of_arrays(record: Record) -> None:
    for state in (record.tx.init(make_params()), record.calls[-1][1][1]):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        found = list(_own_states(state))
        assert found and all(found)


def _own_states(tree: Any) -> Iterator[bool]:
    """Whether each node that kfgn put into a state is a NamedTuple."""
    children = jax.tree.leaves(tree, is_leaf=lambda x: x is not tree)
    if type(tree).__module__.startswith("kfgn."):
        yield isinstance(tree, tuple) and hasattr(tree, "_fields")
    for child in children:
        if child is not tree:
            yield from _own_states(child)


def check_jit_equals_no_jit(record: Record, counts: tuple[int, ...]) -> None:
    # disable_jit also runs cond and while_loop as Python, on concrete values.
    for count in counts:
        (grads, state, params, keywords), expected = record.calls[count - 1]
        with jax.disable_jit():
            actual = record.tx.update(grads, state, params, **keywords)
        # One update: float32's roundoff, which the solves magnify a little. The change of an
        # objective of about 1 has the roundoff of both values, which differs between versions.
        both = map(_without_ratio, (actual, expected))
        assert_close(*both, 1e-4, roundoff=2 * float(np.finfo(np.float32).eps))


def _without_ratio(tree: Any) -> Any:
    """With the change of the objective alone, not over what was predicted of it."""

    def has_ratio(node: Any) -> bool:
        return hasattr(node, "reduction_ratio") and hasattr(node, "predicted_change")

    def changed(node: Any) -> Any:
        if not has_ratio(node):
            return node
        return node._replace(reduction_ratio=node.reduction_ratio * node.predicted_change)

    return jax.tree.map(changed, tree, is_leaf=has_ratio)
