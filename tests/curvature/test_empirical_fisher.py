"""The empirical Fisher matrix where kernels are shared, looked up, stacked or in no layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.base.trees import named_leaves
from tests.tables.architectures import ROWS, loss_row, make_targets
from tests.tables.comparison import close

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize(
    "name",
    ["embed", "embed_tied", "tied", "scan_layers", "conv_1d_groups", "layer_norm", "weight_norm",
     "token_added"],
)  # fmt: skip
def test_blocks_and_diagonals(name):
    """The outer products of every example's gradient by jax.grad, in the entries of a block."""
    case, row = ROWS[name].case(), loss_row(name)
    batch = (case.inputs, make_targets(name, case))
    operator = kfgn.empirical_fisher(kfgn.Objective(case.model, row.loss))

    def gradient(params, x, y):
        def value(p):
            outputs = case.model(p, jax.tree.map(lambda a: a[None], x))
            return row.reference(jax.tree.map(lambda a: a[0], outputs), y)

        return jax.grad(value)(params)

    @jax.jit
    def everything(params, batch):
        each = jax.vmap(gradient, (None, 0, 0))(params, *batch)
        blocks = operator.blocks(params, batch)
        by_example = operator.blocks(params, batch, per_example=True)
        return each, blocks, by_example, operator.diagonal(params, batch, chunk_size=2)

    found = jax.tree.map(np.asarray, everything(case.params, batch))
    each, blocks, by_example, diagonals = found
    rows = np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(each))
    index = ravel_pytree(case.params)[1](jnp.arange(rows.shape[1], dtype=rows.dtype))
    places = named_leaves(index)
    found = kfgn.layers.find_blocks(operator.objective, case.params, batch, unassigned="gradient")
    assert set(blocks) == set(diagonals) == {*found.layers, *found.unassigned}
    for block, matrix in blocks.items():
        layer = found.layers.get(block)
        order = places[block] if layer is None else layer.to_matrix(places)
        slots = 1 if layer is None else layer.kernels
        own = rows[:, np.asarray(order).astype(int).reshape(slots, -1)]
        truth = np.einsum("nsi,nsj->nsij", own, own)
        close(by_example[block].reshape(truth.shape), truth, block)
        close(matrix.reshape(truth.shape[1:]), truth.mean(axis=0), block)
        squares = np.mean(own**2, axis=0).reshape(np.shape(order))
        close(diagonals[block], squares, block)


def test_no_large_matrix_is_formed():
    """Its diagonal is that of squared gradients, where no recursion over positions would fit."""

    def model(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["first"], (1, 1), "SAME", dimension_numbers=dims)
        h = jax.lax.conv_general_dilated(
            jnp.tanh(h), p["second"], (1, 1), "SAME", dimension_numbers=dims
        )
        return jnp.mean(h, axis=(1, 2))

    params = {"first": jnp.ones((1, 1, 1, 8)), "second": jnp.ones((1, 1, 8, 2))}
    batch = (jnp.ones((3, 64, 64, 1)), jnp.zeros((3, 2)))
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    with pytest.raises(kfgn.errors.ModelError, match="the recursion's matrix over a value"):
        kfgn.gauss_newton(objective).diagonal(params, batch)
    found = jax.jit(kfgn.empirical_fisher(objective).diagonal)(params, batch)
    gradient = jax.grad(lambda p: objective.mean_loss(p, batch))(params)  # examples are alike
    close(found["second"].ravel(), np.ravel(gradient["second"] ** 2))
