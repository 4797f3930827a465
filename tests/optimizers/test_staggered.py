"""Inverses refreshed in turns: which are new when, and that the steps are those of the parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.optimizers.staggered import in_turns
from tests.tables.small import OBJECTIVE, make_batch, make_params, make_step

get = optax.tree_utils.tree_get


@pytest.mark.parametrize("name", ["recipe", "eigen", "kronecker"])
def test_each_block_has_its_turn(name):
    """All at the first two updates, then one of two; what is new is inverted at the factors."""
    params, batch = make_params(), make_batch()
    if name == "kronecker":
        blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
        tx = kfgn.transforms.scale_by_kronecker(
            blocks, 0.1, refresh_inverse_every=2, stagger=True, decay=0.5
        )
        tx = optax.chain(tx, optax.scale(-0.3))
    else:
        inverse = "eigen" if name == "eigen" else "factored"
        options = {"refresh_inverse_every": 2, "inverse": inverse, "stagger": True}
        tx = kfgn.kfra(OBJECTIVE, params, batch, **options)
    step, state, losses = jax.jit(make_step(tx)), tx.init(params), []
    turns = in_turns(get(state, "factors"), 2)
    assert sorted(map(len, turns)) == [1, 1]
    for k in range(6):
        before = get(state, "inverses")
        params, state, loss = step(params, state, make_batch(seed=k % 2))
        losses.append(float(loss))
        found = {
            name for name, new in get(state, "inverses").items()
            if any(map(np.any, jax.tree.map(lambda a, b: a != b, new, before[name])))
        }  # fmt: skip
        assert found == (set(before) if k < 2 else set(turns[k % 2])), k
        for layer in found:  # at the factors of now
            q, g = get(state, "factors")[layer]
            inverse = get(state, "inverses")[layer]
            if name == "eigen":
                values, vectors = inverse.right_values, inverse.right_vectors
                back, expected = (vectors * values) @ vectors.T, g
            else:
                damping = 0.1 if name == "kronecker" else get(state, "factor_damping") + 1e-3
                root, omega = (
                    jnp.sqrt(damping),
                    jnp.sqrt(jnp.trace(q) / len(q) / (jnp.trace(g) / len(g))),
                )
                back = inverse.right @ (g + root / omega * jnp.eye(len(g)))
                expected = jnp.eye(len(g))
            np.testing.assert_allclose(back, expected, rtol=0, atol=1e-4)
    assert losses[-1] < losses[0]


def test_the_work_of_turns_is_even():
    """The largest turn has at most the mean and one block's more."""
    rng = np.random.default_rng(0)
    shapes = [(int(a), int(b)) for a, b in rng.integers(5, 40, size=(20, 2))]
    factors = {f"{i}": tuple(jnp.zeros((n, n)) for n in s) for i, s in enumerate(shapes)}
    work = {f"{i}": a**3 + b**3 for i, (a, b) in enumerate(shapes)}
    loads = [sum(work[n] for n in turn) for turn in in_turns(factors, 4)]
    assert sum(loads) == sum(work.values())
    assert max(loads) <= 1.1 * sum(loads) / 4
    assert loads[0] == min(loads)  # at that update factors are observed, too


def test_what_cannot_take_turns():
    params, batch = make_params(), make_batch()
    mesh = jax.make_mesh((1,), ("d",))
    bad = {
        "does not search": {"factor_damping": 1.0},
        "whole number": {"refresh_inverse_every": jnp.array(5)},
        "True or False": {"stagger": 1},
    }
    for message, options in bad.items():
        with pytest.raises(kfgn.errors.OptionError, match=message):
            kfgn.kfra(OBJECTIVE, params, batch, **{"stagger": True, **options})
    for wrong in ("d", jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())):
        with pytest.raises(kfgn.errors.OptionError, match="factor_sharding must be"):
            kfgn.kfra(OBJECTIVE, params, batch, factor_sharding=wrong)
