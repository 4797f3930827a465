"""Factors that are too large: refused by name, split into blocks, or kept as diagonals."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.base.trees import named_leaves
from kfgn.errors import LayerError

VOCABULARY, WIDTH, COUNT, LENGTH = 12, 4, 6, 5
LABELS = kfgn.losses.softmax_cross_entropy_with_integer_labels


def language_model(params: Any, tokens: jax.Array) -> jax.Array:
    """The next token from the mean of those so far; the table is tied to the output."""
    h = params["table"][tokens]
    seen = jnp.cumsum(h, axis=1) / jnp.arange(1.0, LENGTH + 1, dtype=h.dtype)[:, None]
    h = h + jnp.tanh(seen @ params["hidden"]["w"] + params["hidden"]["b"])
    return h @ params["table"].T


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) / 2


PARAMS = {
    "table": numbers(0, VOCABULARY, WIDTH),
    "hidden": {"w": numbers(1, WIDTH, WIDTH), "b": numbers(2, WIDTH)},
}
# A walk around a circle, whose steps are 1 or 2 by turns.
STEPS = np.cumsum(np.arange(LENGTH + 1) % 2 + 1)
TOKENS = ((STEPS + 2 * np.arange(COUNT)[:, None]) % VOCABULARY).astype(np.int32)
BATCH = TOKENS[:, :-1], TOKENS[:, 1:]
LIKELIHOOD = kfgn.Objective(lambda p, x: language_model(p, x)[:, -1], LABELS)
LAST = BATCH[0], BATCH[1][:, -1]


def factors(objective, batch, **options):
    function = kfgn.value_grad_and_curvature(objective, "kflr", **options)
    return function(PARAMS, batch)[1].factors


def diagonal_blocks(matrix, most):
    """The fewest equal blocks of at most so many rows, of a matrix padded with zeros behind it."""
    count = -(-len(matrix) // most)
    rows = -(-len(matrix) // count)
    padded = np.pad(matrix, (0, count * rows - len(matrix)))
    return np.stack([padded[k : k + rows, k : k + rows] for k in range(0, count * rows, rows)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("treatment", "rows"), [("split", 3), ("diagonal", 1)])
def test_blocks_are_those_of_the_whole_factor(treatment, rows):
    """Of a tied table, the diagonal of the look-ups and the output's share."""
    whole = factors(LIKELIHOOD, LAST)
    found = factors(LIKELIHOOD, LAST, large_factors=treatment, factor_limit=3)
    for name in ("table", "hidden"):
        for own, other in zip(found[name], whole[name], strict=True):
            blocks = own.reshape(-1, *own.shape[-2:])
            expected = diagonal_blocks(np.asarray(other), rows)
            np.testing.assert_allclose(blocks, expected, rtol=1e-12, atol=1e-14)


def sum_of_uses():
    """A tied table, one that is looked up alone, and one that is a kernel alone, transposed."""
    square = kfgn.losses.half_squared_error
    terms = {
        "tied": LIKELIHOOD,
        "looked up": kfgn.Objective(lambda p, x: p["table"][x[:, 0]], square),
        "kernel": kfgn.Objective(lambda p, x: jnp.tanh(x @ p["table"].T), square),
    }
    batch = {
        "tied": LAST,
        "looked up": (TOKENS[:3], numbers(3, 3, WIDTH)),
        "kernel": (numbers(4, 7, WIDTH), numbers(5, 7, VOCABULARY)),
    }
    return kfgn.sum_of(terms, {"kernel": 3.0}), batch


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("terms", [["tied", "looked up", "kernel"], ["looked up", "kernel"]])
@pytest.mark.parametrize(("treatment", "rows"), [("split", 3), ("diagonal", 1)])
def test_blocks_of_sums(terms, treatment, rows):
    """Those of the merged factors, whichever way each term sees the table."""
    whole, batches = sum_of_uses()
    objective = kfgn.sum_of({n: whole.terms[n] for n in terms}, {"kernel": 3.0})
    batch, names = {n: batches[n] for n in terms}, ["table", "hidden"][: len(terms) - 1]
    used = {n: PARAMS[n] for n in names}

    def measured(**options):
        function = kfgn.value_grad_and_curvature(objective, "kflr", **options)
        return jax.jit(function)(used, batch)[1].factors

    options = {"large_factors": treatment, "factor_limit": 3}
    expected, found = measured(), measured(**options)
    for name in names:
        for own, other in zip(found[name], expected[name], strict=True):
            blocks = own.reshape(-1, *own.shape[-2:])
            wanted = diagonal_blocks(np.asarray(other), rows)
            np.testing.assert_allclose(blocks, wanted, rtol=1e-12, atol=1e-14)
    tx = kfgn.kflr(objective, used, batch, **options)
    shapes = jax.tree.map(jnp.shape, optax.tree.get(tx.init(used), "factors"))
    assert shapes == jax.tree.map(jnp.shape, found)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("inverse", ["factored", "eigen"])
def test_direction_is_that_of_the_blocks(inverse):
    """Each block of rows and columns is solved on its own."""
    options = {"large_factors": "split", "factor_limit": 3}
    blocks = kfgn.layers.find_blocks(LIKELIHOOD, PARAMS, LAST, **options)
    tx = kfgn.transforms.scale_by_kronecker(blocks, 0.1, decay=None, inverse=inverse)
    curvature_fn = kfgn.value_grad_and_curvature(LIKELIHOOD, "kflr", **options)
    (_, gradient), curvature = curvature_fn(PARAMS, LAST)
    step, _ = tx.update(gradient, tx.init(PARAMS), PARAMS, curvature=curvature)
    q, g = (np.asarray(x) for x in factors(LIKELIHOOD, LAST)["table"])
    qs, gs = diagonal_blocks(q, 3), diagonal_blocks(g, 3)  # four of 3 rows, two of 2
    matrix, expected, root = np.asarray(gradient["table"]), np.zeros((12, 4)), 0.1**0.5
    balance = np.sqrt(np.trace(q) / 12 / (np.trace(g) / 4))
    for i, block in enumerate(qs):
        for o, other in enumerate(gs):
            at = slice(3 * i, 3 * i + 3), slice(2 * o, 2 * o + 2)
            if inverse == "factored":
                solved = np.linalg.solve(block + balance * root * np.eye(3), matrix[at])
                expected[at] = solved @ np.linalg.inv(other + root / balance * np.eye(2))
            else:
                full = np.kron(block, other) + 0.1 * np.eye(6)
                expected[at] = np.linalg.solve(full, matrix[at].reshape(-1)).reshape(3, 2)
    np.testing.assert_allclose(step["table"], expected, rtol=1e-9, atol=1e-12)


SHAPES = (
    {"table": jax.ShapeDtypeStruct((50000, 64), jnp.float32)},
    (jax.ShapeDtypeStruct((8, 16), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)),
)
LARGE = kfgn.Objective(lambda p, x: jnp.mean(p["table"][x], axis=1) @ p["table"].T, LABELS)
MESSAGE = (
    r"activation factor of layer 'table' would have 50000 x 50000 entries \(9.31 GiB\); at most "
    r"23170 rows are formed. Pass large_factors=\"split\" .* or large_factors=\"diagonal\""
)


@pytest.mark.parametrize("act", ["create", "curvature", "inspect"])
def test_vocabulary_too_large(act):
    """Said by name at creation, by the curvature, and shown by `inspect` before."""
    if act == "inspect":
        found = kfgn.inspect(LARGE, *SHAPES, file=io.StringIO())
        assert "activation factor of layer 'table' would have 50000 x 50000" in str(found)
        return
    with pytest.raises(LayerError, match=MESSAGE):
        if act == "create":
            kfgn.kfac(LARGE, *SHAPES)
        else:
            curvature_fn = kfgn.value_grad_and_curvature(LARGE, "kfac")
            jax.eval_shape(lambda p, b: curvature_fn(p, b, key=jax.random.key(0)), *SHAPES)


@pytest.mark.parametrize(("treatment", "shape"), [
    ("split", (3, 1, 16667, 16667)), ("diagonal", (50000, 1, 1, 1))
])  # fmt: skip
def test_remedies_for_a_vocabulary_too_large(treatment, shape):
    curvature_fn = kfgn.value_grad_and_curvature(LARGE, "kfac", large_factors=treatment)
    _, found = jax.eval_shape(lambda p, b: curvature_fn(p, b, key=jax.random.key(0)), *SHAPES)
    assert found.factors["table"].activation.shape == shape
    tx = kfgn.kfac(LARGE, *SHAPES, large_factors=treatment)
    state = jax.eval_shape(tx.init, SHAPES[0])
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert shape in shapes


@pytest.mark.parametrize("treatment", ["split", "diagonal"])
def test_a_language_model_trains(treatment):
    """With KFAC, at a limit below the vocabulary."""
    options = {"large_factors": treatment, "factor_limit": 5}
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = kfgn.kfac(LIKELIHOOD, params, LAST, **options)
    curvature_fn = kfgn.value_grad_and_curvature(LIKELIHOOD, "kfac", **options)

    @jax.jit
    def step(params, state, key):
        (value, grads), curvature = curvature_fn(params, LAST, key=key)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, start = tx.init(params), LIKELIHOOD(params, LAST)
    for key in jax.random.split(jax.random.key(0), 30):
        params, state, _ = step(params, state, key)
    assert LIKELIHOOD(params, LAST) < 0.3 * start
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0
    assert named_leaves(params).keys() == named_leaves(PARAMS).keys()
