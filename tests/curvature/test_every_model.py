"""Every architecture of the table beside dense truth: blocks, diagonals, factors, methods."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

import kfgn
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.model.layers.layer import Layer
from tests.tables.architectures import KINDS, ROWS, SAME_EQUATIONS, SECOND_LOSS
from tests.tables.row_truth import (
    entries,
    factors,
    is_one_row,
    results,
    row_of,
    setting,
    slots,
    submatrices,
    truth,
)

pytestmark = pytest.mark.usefixtures("x64", "promotion")

every_model = pytest.mark.parametrize("name", ROWS)  # how it is read knows of no loss
EVERY = [*ROWS, *(f"{name} with {loss}" for name, loss in SECOND_LOSS.items())]
# What is computed in bfloat16 is read like the rest, but not exact.
EXACT = [name for name in EVERY if "bf16" not in row_of(name).tags]
every_exact_row = pytest.mark.parametrize("name", EXACT)
every_exact_model = pytest.mark.parametrize("name", [name for name in EXACT if name in ROWS])


@pytest.fixture
def promotion(request: pytest.FixtureRequest, strict_dtypes: None) -> Iterator[None]:
    """Strict dtypes, except for the rows that say they cannot have them."""
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else None
    with jax.numpy_dtype_promotion(row_of(name).promotion if name else "strict"):
        yield


def close(name, found, expected):
    """Up to roundoff of a few hundred operations, relative to the largest entry."""
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * row_of(name).tolerance * scale)


# How the model is read.


@every_model
def test_layers(name):
    """Every parameter is in the block it should be in, under its name."""
    graph, row = setting(name).graph, row_of(name)
    assert {n: layer.parameters for n, layer in graph.layers.items()} == row.expected
    assert set(graph.reasons) == set(row.unassigned)


@every_model
def test_parameters_round_trip(name):
    """`from_matrix` undoes `to_matrix`; entries that no use reads come back as zeros."""
    case, _, _, graph = setting(name)
    leaves, places, start = named_leaves(case.params), {}, 1
    for parameter, leaf in leaves.items():
        places[parameter] = np.arange(start, start + leaf.size).reshape(leaf.shape)
        start += leaf.size
    for block, layer in graph.layers.items():
        back = truth(name).back[block]
        assert set(back) == set(layer.parameters)
        for parameter, value in back.items():
            read = np.isin(places[parameter], truth(name).places[block])
            assert value.dtype == leaves[parameter].dtype and np.any(read)
            np.testing.assert_array_equal(value, np.where(read, leaves[parameter], 0))
    whole = with_leaves(case.params, leaves)
    assert jax.tree.structure(whole) == jax.tree.structure(case.params)


@every_exact_model
def test_uses(name):
    """The Jacobian in a kernel is that in the pre-activations times the inputs, over all uses."""
    jacobian = truth(name).jacobian
    for block, layer in setting(name).graph.layers.items():
        flipped = list(slots(name, block, flipped=True))
        for k, (upright, rows) in enumerate(zip(slots(name, block), entries(name)[block],
                                                strict=True)):  # fmt: skip
            terms = zip(upright.inputs, upright.jacobians, upright.slopes, strict=True)
            whole = sum(np.einsum("nsti,nksto->nksio", a, j) * d for a, j, d in terms)
            terms = zip(flipped[k].inputs, flipped[k].jacobians, flipped[k].slopes, strict=True)
            turned = sum(
                (np.einsum("nsti,nksto->nksio", a, j) * d).swapaxes(-1, -2) for a, j, d in terms
            )
            if flipped[k].inputs:  # where no bias is added
                whole[..., : turned.shape[-2], :] += turned
            there = rows >= 0
            found = whole.reshape(*jacobian.shape[:2], -1)[:, :, there]
            close(name, found, jacobian[:, :, rows[there]])
        assert len(layer.slots) == len(flipped) == len(entries(name)[block])


# Matrices.


@every_exact_row
def test_gradient(name):
    close(name, results(name)["gradient"], truth(name).gradient)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "gauss_newton") for name in EXACT]
    + [(name, "hessian") for name in EXACT if name not in SAME_EQUATIONS],
)
def test_blocks(name, kind):
    """Exact for every parameter, in a layer or not, with all cross terms of tied ones."""
    whole = truth(name).hessian if kind == "hessian" else truth(name).gauss_newton.mean(axis=0)
    found = results(name)[f"block_{kind}"]
    assert set(found) == set(entries(name))
    for block, ours in found.items():
        expected = submatrices(whole, entries(name)[block])
        close(name, ours.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", [name for name in EXACT if name in KINDS])
def test_hessian_diagonal(name):
    diagonal = np.diag(truth(name).hessian)
    found = results(name)["hessian_diagonal"]
    assert set(found) == set(entries(name))
    for block, ours in found.items():
        close(name, ours.reshape(-1), np.append(diagonal, 0)[entries(name)[block]].reshape(-1))


@pytest.mark.parametrize("name", [name for name in EXACT if row_of(name).unassigned])
def test_unassigned_diagonal(name):
    """The exact diagonal of the Gauss-Newton matrix, of parameters in no layer."""
    diagonal = np.diag(truth(name).gauss_newton.mean(axis=0))
    for parameter in row_of(name).unassigned:
        found = results(name)["expand"][parameter].diagonal.reshape(-1)
        close(name, found, diagonal[entries(name)[parameter][0]])


# Factors.


@pytest.mark.parametrize(
    ("name", "sharing"),
    [(name, "expand") for name in EXACT] + [(name, "reduce") for name in EXACT if name in ROWS],
)
def test_kflr_is_exact(name, sharing):
    """Q and G are what their definitions say, at any number of examples."""
    layers = setting(name).graph.layers
    # Where every kernel is used at one position the definitions are one.
    found = results(name).get(sharing, results(name)["expand"])
    assert layers and set(layers) <= set(found)
    for block in layers:
        for ours, expected in zip(found[block], factors(name, block, sharing), strict=True):
            close(name, ours, expected)


@every_exact_row
def test_kfra_is_exact_for_one_example(name):
    """The recursion's expectations are then no approximations."""
    for block in setting(name).graph.layers:
        found = results(name)["kfra_of_one"][block]
        for ours, expected in zip(found, factors(name, block, "expand", count=1), strict=True):
            close(name, ours, expected)


def kronecker(layer: Layer, q: np.ndarray, g: np.ndarray) -> np.ndarray:
    """`Q ⊗ G` of every slot, `[slots, n, n]`, groups on the diagonal."""
    q = q.reshape(layer.stack, *layer.activation_shape[-1 if layer.indexed else -2 :])
    g = g.reshape(layer.stack, layer.d_out, layer.d_out)
    parts = [
        np.kron(np.diag(a) if layer.indexed else a, b) for a, b in zip(q, g, strict=True)
    ]  # fmt: skip
    groups, size = layer.first.form.groups, len(parts[0])
    whole = np.zeros((len(layer.slots), groups, size, groups, size))
    for k, part in enumerate(parts):
        whole[k // groups, k % groups, :, k % groups] = part
    return whole.reshape(len(layer.slots), groups * size, groups * size)


# Where every kernel is used in several places, or has groups.
SHARED_ALL_OVER = """
    conv_1d_sequence conv_2d_image dense_sequence dense_sequence_without_bias
    dense_sequence_pooled_at_the_end dense_grid dense_grid_without_bias
    dense_general_sequence embed_alone embed_tied embed_tied_pooled scalar_scale_sequence
    vector_scale_sequence position_scale scale_and_shift tied_transposed
    scan_layers_sequence rnn_scan_sequence linen_gru_sequence swiglu_sequence layer_scale
    mixer unet attention_linen attention_causal attention_cross attention_nnx
    attention_nnx_defaults attention_equinox encoder_block nnx_shared_module equinox_image
    lists complex_kernel laplacian_and_boundary burgers_by_grad stacked_jvp_of_grad
"""


@pytest.mark.parametrize(
    "name", [name for name in EXACT if name.partition(" with ")[0] not in SHARED_ALL_OVER.split()]
)
def test_kronecker_of_one_example_in_one_place(name):
    """`Q ⊗ G` is the block itself where a kernel is used once per example, N = 1."""
    layers = setting(name).graph.layers
    once = {
        block: layer for block, layer in layers.items()
        if layer.first.form.groups == 1
        and all(layer.positions(k) == 1 for k in range(len(layer.slots)))
    }  # fmt: skip
    assert once
    for block, layer in once.items():
        expected = submatrices(truth(name).gauss_newton[0], entries(name)[block])
        there = (entries(name)[block] >= 0).astype(float)
        found = kronecker(layer, *results(name)["kfra_of_one"][block])
        close(name, found * there[:, :, None] * there[:, None], expected)


# One row for each way to share a kernel.
SHARED = ("conv_1d_strided", "conv_2d_groups", "dense_sequence", "embed", "einsum_heads",
          "token_prepended", "scan_layers", "tied", "tied_transposed", "siamese")  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_pre_activation_matrices(name):
    """`J'HJ` of every example over all positions of a use, in the order of the value itself."""
    case, objective, batch, graph = setting(name)
    function = kfgn.gauss_newton(objective).pre_activation
    found = jax.jit(function)(case.params, batch)
    assert set(found) == set(graph.uses)
    for use, matrix in found.items():
        jacobian = truth(name).probed[use]
        jacobian = jacobian.reshape(*jacobian.shape[:2], -1)
        hessian = truth(name).output_hessian
        close(name, matrix, np.einsum("nkp,nkl,nlq->npq", jacobian, hessian, jacobian))


def test_table_has_what_is_shared():
    """One row that is added, look-ups, groups, slots, transposed uses: none tests nothing."""
    layers = [layer for name in SHARED for layer in setting(name).graph.layers.values()]
    assert any(map(is_one_row, layers)) and any(layer.indexed for layer in layers)
    assert any(layer.first.form.groups > 1 for layer in layers)
    assert any(len(layer.slots) > 1 for layer in layers) and any(la.flipped for la in layers)
