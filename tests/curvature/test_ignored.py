"""Positions that the loss ignores: factors as if they were cut off."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from tests.tables.comparison import close

pytestmark = pytest.mark.usefixtures("x64")

IGNORED, TOKENS, WIDTH, CLASSES, LENGTH = -100, 5, 4, 3, 6
LOSS = kfgn.losses.softmax_cross_entropy_with_integer_labels.with_options(ignore_index=IGNORED)
KERNELS = ("query", "key", "value", "in", "out")


def inside(p, tokens):
    """What every kernel is applied to, and the logits, of causal attention."""
    h = p["embed"][tokens]
    scores = jnp.einsum("...td,...ud->...tu", h @ p["query"], h @ p["key"])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(seen, scores, -jnp.inf)
    nowhere = jnp.zeros_like(scores[..., :1])  # else the first query is none
    weights = jax.nn.softmax(jnp.concatenate([scores, nowhere], -1))[..., :-1]
    mixed = jnp.tanh(h + weights @ (h @ p["value"]))
    last = jnp.tanh(mixed @ p["in"]["w"] + p["in"]["b"])
    rows = {"query": h, "key": h, "value": h, "in": mixed, "out": last}
    return rows, last @ p["out"]


def model(p, tokens):
    return inside(p, tokens)[1]


def problem(count=5):
    """Token 0 fills up what is short, and is large."""
    keys = jax.random.split(jax.random.key(0), 9)

    def normal(key, *shape):
        return jax.random.normal(key, shape) / 2

    params = {name: normal(key, WIDTH, WIDTH) for name, key in zip(KERNELS[:3], keys, strict=False)}
    params["embed"] = normal(keys[3], TOKENS, WIDTH).at[0].multiply(20)
    params["in"] = {"w": normal(keys[4], WIDTH, WIDTH), "b": normal(keys[5], WIDTH)}
    params["out"] = normal(keys[6], WIDTH, CLASSES)
    tokens = jax.random.randint(keys[7], (count, LENGTH), 1, TOKENS)
    return params, tokens, jax.random.randint(keys[8], (count, LENGTH), 0, CLASSES)


def filled(tokens, labels, lengths):
    there = jnp.arange(LENGTH) < jnp.asarray(lengths)[:, None]
    return jnp.where(there, tokens, 0), jnp.where(there, labels, IGNORED)


def factors_of(objective, params, batch, method="kflr", **options):
    keys = {"key": jax.random.key(3)} if method == "kfac" else {}
    function = kfgn.value_grad_and_curvature(objective, method, **options)
    return jax.jit(lambda p, b: function(p, b, **keys)[1].factors)(params, batch)


def expected(rows, counts, sharing, weights=None):
    """Q by hand, of rows `[N, T, d]` in places `[N, T]` that count."""
    rows, counts = np.asarray(rows), np.asarray(counts, float)
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights)
    if sharing == "expand":
        found = np.einsum("n,nt,nti,ntj->ij", weights, counts, rows, rows)
        return LENGTH * found / np.sum(weights[:, None] * counts)
    means = np.einsum("nt,nti->ni", counts, rows) / np.maximum(counts.sum(1, keepdims=True), 1)
    alive = weights * (counts.sum(1) > 0)
    return np.einsum("n,ni,nj->ij", alive, means, means) / alive.sum()


def with_bias(name, rows):
    return jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1) if name == "in" else rows


def check_activations(found, params, tokens, counts_of, sharing, weights=None):
    rows, _ = inside(params, tokens)
    for name in KERNELS:
        block = "in/w" if "in/w" in found and name == "in" else name
        own = expected(with_bias(name, rows[name]), counts_of(name), sharing, weights)
        close(found[block].activation, own, name)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("method", ["kfra", "kflr", "kfac", "empirical"])
def test_padding_is_not_in_q(method, sharing):
    """Sequences of several lengths, one of them empty."""
    params, tokens, labels = problem()
    batch = filled(tokens, labels, lengths := (6, 3, 1, 4, 0))
    counts = np.arange(LENGTH) < np.asarray(lengths)[:, None]
    found = factors_of(kfgn.Objective(model, LOSS), params, batch, method, sharing=sharing)
    check_activations(found, params, batch[0], lambda _: counts, sharing)
    looked_up = np.bincount(np.asarray(batch[0])[counts], minlength=TOKENS)
    close(found["embed"].activation, LENGTH * looked_up / counts.sum(), "embed")


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_place_counts_for_what_depends_on_it(sharing):
    """A prompt without labels is read by keys and values alone; nothing reads what comes last."""
    params, tokens, labels = problem()
    labels = labels.at[:, :2].set(IGNORED).at[:, -1].set(IGNORED)
    place, weights = np.broadcast_to(np.arange(LENGTH), tokens.shape), np.arange(1.0, 6.0)

    def counts_of(name):
        return (place < 5) if name in ("key", "value") else (place >= 2) & (place < 5)

    objective = kfgn.Objective(model, LOSS)
    found = factors_of(objective, params, (tokens, labels, weights), sharing=sharing)
    check_activations(found, params, tokens, counts_of, sharing, weights)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_blocks_are_those_without_padding(sharing):
    """`Q ⊗ G` of sequences of one length is what it is with the rest cut off."""
    params, tokens, labels = problem()
    objective, length = kfgn.Objective(model, LOSS), 4
    padded = filled(tokens, labels, (length,) * len(tokens))
    cut = tokens[:, :length], labels[:, :length]
    for method in ("kfra", "kflr", "empirical"):
        of_padded, of_cut = (
            factors_of(objective, params, batch, method, sharing=sharing) for batch in (padded, cut)
        )
        shorter = LENGTH / length if sharing == "expand" else 1.0
        for name, (q, g) in of_cut.items():
            own = LENGTH / length if name == "embed" else shorter  # always "expand"
            close(of_padded[name].activation, q * own, f"{method} Q of {name}")
            close(of_padded[name].pre_activation, g / own, f"{method} G of {name}")


def test_of_few_examples():
    """Q of a part of the batch has the part's own places that count."""
    params, tokens, labels = problem(130)
    lengths = np.arange(130) % (LENGTH + 1)
    batch = filled(tokens, labels, lengths)
    found = factors_of(kfgn.Objective(model, LOSS), params, batch, activation_rows=1)
    counts = np.arange(LENGTH) < lengths[:, None]
    part = slice(0, 128, 2)
    own = expected(inside(params, batch[0])[0]["query"][part], counts[part], "expand")
    close(found["query"].activation, own * counts[part].mean() / counts.mean())


def test_a_loss_of_ones_own_says_what_counts():
    """Of a tree of outputs, by masks that broadcast to them, with a loss that reads them."""
    params, tokens, labels = problem()
    tokens, labels = filled(tokens, labels, lengths := (6, 3, 1, 4, 0))
    counts = np.arange(LENGTH) < np.asarray(lengths)[:, None]

    def two(p, x):
        logits = model(p, x)
        return {"logits": logits, "first": logits[..., 0]}

    def function(outputs, target):
        y, mask = target
        plain = kfgn.losses.softmax_cross_entropy_with_integer_labels
        one = jax.vmap(plain)(outputs["logits"], jnp.where(mask, y, 0))
        return jnp.sum(jnp.where(mask, one + 0.1 * outputs["first"] ** 2, 0))

    def heeded(_, target):
        return {"logits": target[1][:, None], "first": target[1]}

    loss = kfgn.losses.from_function(function, convex=True, heeded=heeded)
    batch = tokens, (labels, jnp.asarray(counts))
    found = factors_of(kfgn.Objective(two, loss), params, batch, "empirical")
    check_activations(found, params, tokens, lambda _: counts, "expand")
    wrong = kfgn.losses.from_function(function, convex=True, heeded=lambda _, target: target[1])
    message = r"heeded must return masks .* of shape \{'first': \(6,\), 'logits': \(6, 3\)\}"
    with pytest.raises(kfgn.errors.LossError, match=message):
        factors_of(kfgn.Objective(two, wrong), params, batch)


def test_a_batch_that_is_ignored():
    """Nothing counts: Q is that of all, as moving averages need it."""
    params, tokens, labels = problem()
    objective = kfgn.Objective(model, LOSS)
    function = functools.partial(factors_of, objective, params)
    nothing = function((tokens, jnp.full_like(labels, IGNORED)))
    for name, (q, _) in function((tokens, labels)).items():
        close(nothing[name].activation, q, name)
        assert not np.any(nothing[name].pre_activation)


def test_masked_outputs_and_dead_units():
    """A mask of series; positions whose units are dead count where nothing is ignored."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=(3, 1)))}
    inputs = jnp.asarray(rng.normal(size=(4, LENGTH, 2)))
    keep = np.arange(LENGTH) < np.asarray([6, 2, 3, 6])[:, None]

    def relu(p, x):
        h = jax.nn.relu(x @ p["a"])
        alive = jnp.arange(LENGTH)[:, None] != 1  # the second place leads nowhere
        return (jnp.where(alive, h, 0) @ p["b"])[..., 0]

    targets = jnp.zeros((4, LENGTH)), jnp.asarray(keep)
    objective = kfgn.Objective(relu, kfgn.losses.masked(kfgn.losses.half_squared_error))
    found = factors_of(objective, params, (inputs, targets))["a"].activation
    reached = (np.asarray(inputs @ params["a"]) > 0).any(-1) & (np.arange(LENGTH) != 1)
    close(found, expected(inputs, keep & reached | keep.all(1)[:, None], "expand"))


def test_steps_of_an_unrolled_network():
    """Uses of a kernel at one position each, of which some are padding."""
    rng = np.random.default_rng(0)
    shapes = {"w": (2, 2), "u": (2, 2), "o": (2, 3)}
    params = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    inputs = jnp.asarray(rng.normal(size=(4, 3, 2)))
    labels = jnp.asarray([[0, 1, 2], [1, 0, IGNORED], [2, IGNORED, IGNORED], [0, 1, IGNORED]])

    def unrolled(p, x):
        h, outputs = jnp.zeros((*x.shape[:-2], 2)), []
        for t in range(3):
            h = jnp.tanh(x[..., t, :] @ p["w"] + h @ p["u"])
            outputs.append(h @ p["o"])
        return jnp.stack(outputs, -2)

    found = factors_of(kfgn.Objective(unrolled, LOSS), params, (inputs, labels))
    counts = np.asarray(labels) != IGNORED
    rows = np.asarray(inputs)[counts]
    close(found["w"].activation, 3 * rows.T @ rows / counts.sum())


def test_experts():
    """Of the examples that data routes to an expert, those that count."""
    rng = np.random.default_rng(0)
    params = {"e": jnp.asarray(rng.normal(size=(2, 3, 3)))}
    inputs, index = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray([0, 0, 1, 1, 1, 0])
    labels = jnp.asarray([0, IGNORED, 2, IGNORED, 1, 2])

    def experts(p, x):
        data, chosen = x
        return jnp.einsum("...i,...io->...o", data, p["e"][chosen])

    batch = (inputs, index), labels
    found = factors_of(kfgn.Objective(experts, LOSS), params, batch)["e"].activation
    for k in range(2):
        rows = np.asarray(inputs)[(np.asarray(index) == k) & (np.asarray(labels) != IGNORED)]
        close(found[k], rows.T @ rows / len(rows) * 3 / 6, f"expert {k}")
