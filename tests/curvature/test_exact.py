"""Every model against dense truth in float64: exact matrices, factors and products."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.base.errors import ParameterError
from tests.tables.comparison import (
    L2,
    OPERATORS,
    by_path,
    close,
    compare,
    operators_of,
    setting,
)
from tests.tables.dense import submatrix
from tests.tables.losses import LOSSES
from tests.tables.nets import MODELS, dense

pytestmark = pytest.mark.usefixtures("x64")

# Each model with the loss of its row, and each loss with one model: the recursions know the
# loss by its gradient and Hessian in the outputs alone. Where branches meet, a full Hessian,
# one that is not definite, and one that may not be. The loss "gaussian" needs the outputs of
# "tree_outputs"; "soft_labels" are other targets for the loss of "one_hot".
ROWS = [(model, row.loss) for model, row in MODELS.items()]
PAIRS = [("tanh", loss) for loss in LOSSES if loss not in ("gaussian", "soft_labels")]
PAIRS += itertools.product(("residual", "gated"), ("coupled", "mixture", "unpromised"))
ROWS += [pair for pair in PAIRS if pair not in ROWS]
every_row = pytest.mark.parametrize(
    ("model", "loss"), ROWS, ids=[f"{model}-{loss}" for model, loss in ROWS]
)
every_operator = pytest.mark.parametrize("kind", OPERATORS)
# What is made of the gradients alone knows no structure; that of every layer kind has
# `test_empirical_fisher`.
every_matrix = pytest.mark.parametrize(
    ("model", "kind"),
    [(model, kind) for model in MODELS for kind in operators_of(model)],
)


def chosen(condition):
    """Parametrises by the models of the table for which a theorem holds."""
    return pytest.mark.parametrize(
        "model", [name for name, row in MODELS.items() if condition(row)]
    )


def eigenvalues(blocks):
    return {name: np.linalg.eigvalsh((b + b.T) / 2) for name, b in blocks.items()}


# Matrices.


@every_row
@every_operator
def test_pre_activation_matrices(model, loss, kind):
    """Eqs. (8) and (22), for every example."""
    _, _, truth, index, _, _, ours = compare(model, loss)
    found, dense = ours[f"pre_activation_{kind}"], getattr(truth, kind)
    assert set(found) == set(index)
    for name, place in index.items():
        assert found[name].dtype == np.float64
        close(found[name], submatrix(dense, place.pre_activation), name)


@every_matrix
def test_blocks(model, kind):
    """Blocks, their diagonals and products, on the row-major vec of kernel and bias."""
    _, _, truth, index, _, direction, ours = compare(model)
    dense = np.mean(getattr(truth, kind), axis=0)
    assert set(ours[f"block_{kind}"]) == set(ours[f"{kind}_diagonal"]) == set(index)
    for name, place in index.items():
        block = submatrix(dense, place.block)
        close(ours[f"block_{kind}"][name], block, name)
        close(ours[f"{kind}_diagonal"][name], np.diag(block).reshape(place.block.shape), name)
    ((name, product),) = ours[f"block_{kind}_matvec"].items()
    place = index[name].block
    expected = submatrix(dense, place) @ direction[place].ravel()
    close(product, expected.reshape(place.shape), name)


@every_matrix
def test_full_products(model, kind):
    """The R-operator with the whole matrix, eq. (13)."""
    case, _, truth, _, own, direction, ours = compare(model)
    product = ours[f"{kind}_product"]
    assert jax.tree.structure(product) == jax.tree.structure(case.params)
    expected = np.mean(getattr(truth, kind), axis=0) @ direction
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(product)])
    close(flat, expected[own])


# The objective.


@every_row
@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
def test_value_and_gradient(model, loss, method):
    """Those of the mean loss and the penalty, whatever the method."""
    case, _, truth, _, own, _, ours = compare(model, loss)
    value, gradient = ours[method]["value_and_grad"]
    params = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(case.params)])
    close(value, truth.value + L2 / 2 * params @ params)
    assert jax.tree.structure(gradient) == jax.tree.structure(case.params)
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    close(flat, truth.gradient[own] + L2 * params)


@every_row
def test_linearized_model(model, loss):
    """The curvature's callables: `Jv`, `v'J'HJv / N`, and the objective elsewhere."""
    _, _, truth, _, own, direction, ours = compare(model, loss)
    found = ours["model"]
    pushed = truth.jacobian @ direction
    close(found["linearized"], pushed)
    close(found["curved"], np.einsum("nk,nkl,nl->", pushed, truth.output_hessian, pushed) / 4)
    close(found["displaced"], found["objective"])
    value, gradient = ours["empirical"]["value_and_grad"]
    close(found["value"], value)
    assert sum(leaf.size for leaf in found["gradient"].values()) == own.size
    for name, leaf in by_path(gradient).items():
        close(found["gradient"][name], leaf, name)


# Factors.


@every_row
def test_kflr_is_exact(model, loss):
    """Eq. (25): the mean of the exact matrices, at any number of examples."""
    _, _, truth, index, _, _, ours = compare(model, loss)
    mean = np.mean(truth.gauss_newton, axis=0)
    for name, place in index.items():
        found = ours["kflr"]["factors"][name].pre_activation
        close(found, submatrix(mean, place.pre_activation), name)


@every_row
def test_empirical_factor(model, loss):
    """The mean outer product of the gradients at the pre-activations."""
    _, _, truth, index, _, _, ours = compare(model, loss)
    for name, place in index.items():
        rows = truth.gradients[:, place.pre_activation]
        close(ours["empirical"]["factors"][name].pre_activation, rows.T @ rows / 4, name)


@every_row
def test_activation_factor(model, loss):
    """Eq. (21): the second moment of the layer's input, with a 1 for the bias."""
    case, _, truth, index, _, _, ours = compare(model, loss)
    checked = 0
    for name, place in index.items():
        # The Jacobian in the kernel is the input times that in the pre-activation.
        slopes = truth.jacobian[..., place.pre_activation]
        scale = np.sum(slopes**2, axis=(1, 2))
        if np.min(scale) < 1e-8:
            continue  # a dead layer hides its input
        d_in = ours["kflr"]["factors"][name].activation.shape[0]
        products = np.einsum("nkij,nkj->ni", truth.jacobian[..., place.block], slopes)
        inputs = products / scale[:, None]
        assert inputs.shape[1] == d_in
        for method in ("kfra", "kflr", "empirical"):
            found = ours[method]["factors"][name].activation
            close(found, inputs.T @ inputs / 4, f"{name} {method}")
        checked += 1
    assert checked
    assert len(case.slots) == len(ours["kflr"]["factors"])


@every_row
@pytest.mark.parametrize("method", ["kfra", "kflr"])
def test_one_example_is_exact(model, loss, method):
    """With a single example the expectations do nothing: `Q ⊗ G` is the whole block."""
    _, _, truth, index, _, _, ours = compare(model, loss)
    first = truth.gauss_newton[0]
    for name, place in index.items():
        q, g = ours["one_example"][method][name]
        close(g, submatrix(first, place.pre_activation), name)
        close(np.kron(q, g), submatrix(first, place.block), name)


@chosen(lambda row: row.last)
def test_kfra_is_exact_in_the_last_layer(model):
    """At any number of examples: nothing was approximated yet."""
    _, _, truth, index, _, _, ours = compare(model)
    mean = np.mean(truth.gauss_newton, axis=0)
    for name in MODELS[model].last:
        found = ours["kfra"]["factors"][name].pre_activation
        close(found, submatrix(mean, index[name].pre_activation), name)


@chosen(lambda row: row.linear)
def test_linear_networks_are_exact(model):
    """With squared error no matrix differs between examples, so no expectation approximates."""
    _, _, truth, index, _, _, ours = compare(model)
    mean = np.mean(truth.gauss_newton, axis=0)
    for name, place in index.items():
        for method in ("kfra", "kflr"):
            q, g = ours[method]["factors"][name]
            close(np.kron(q, g), submatrix(mean, place.block), f"{name} {method}")


def test_kfra_approximates_elsewhere():
    """Several examples and a nonlinearity: the tests above could fail."""
    kfra, kflr = (compare("tanh").ours[method]["factors"]["first"] for method in ("kfra", "kflr"))
    difference = np.abs(kfra.pre_activation - kflr.pre_activation)
    assert np.max(difference) > 1e-2 * np.max(np.abs(kflr.pre_activation))


# Piecewise linear networks.


@chosen(lambda row: row.piecewise_linear)
def test_piecewise_linear_networks_have_no_negative_curvature(model):
    """Section 3.2: with a convex loss the Hessian's blocks are the Gauss-Newton blocks."""
    ours = compare(model).ours
    for name, spectrum in eigenvalues(ours["block_hessian"]).items():
        close(ours["block_hessian"][name], ours["block_gauss_newton"][name], name)
        # Rounding moves eigenvalues by 1e-16 of the largest, times their number.
        assert spectrum[0] >= -1e-13 * spectrum[-1]


def test_smooth_networks_have_negative_curvature():
    """The test above could fail: with tanh between the layers it would."""
    spectra = eigenvalues(compare("tanh").ours["block_hessian"])
    assert min(spectrum[0] / spectrum[-1] for spectrum in spectra.values()) < -1e-2


# Ways to compute the same.

VERBS = ("pre_activation", "diagonal")
THREE = pytest.mark.parametrize("model", ["tanh", "several_depths", "gated"])


def name_of(kind, verb):
    """What `compare` calls it."""
    return f"pre_activation_{kind}" if verb == "pre_activation" else f"{kind}_diagonal"


@THREE
def test_chunks_change_nothing(model):
    """One example at a time, chunks that do not divide the batch, larger ones, all at once."""
    case, objective, batch = setting(model)
    expected = compare(model).ours

    @jax.jit
    def variants(params, batch):
        return {
            (name_of(kind, verb), chunk): getattr(make(objective), verb)(
                params, batch, chunk_size=None if chunk == "all" else int(chunk)
            )
            for kind, make in OPERATORS.items()
            for verb in VERBS
            for chunk in ("3", "10", "all")
        }

    for (name, chunk), found in variants(case.params, batch).items():
        for layer, matrix in found.items():
            close(matrix, expected[name][layer], f"{name}, chunks of {chunk}, {layer}")


@THREE
def test_reduced_to_the_mean(model):
    """`reduce="mean"` is the mean over examples, in chunks of any size."""
    case, objective, batch = setting(model)
    expected = compare(model).ours

    @jax.jit
    def means(params, batch):
        return {
            (kind, chunk): make(objective).pre_activation(
                params, batch, reduce="mean", chunk_size=int(chunk)
            )
            for kind, make in OPERATORS.items()
            for chunk in "123"
        }

    for (kind, chunk), found in means(case.params, batch).items():
        for name, matrix in found.items():
            mean = np.mean(expected[f"pre_activation_{kind}"][name], axis=0)
            close(matrix, mean, f"{kind}, chunks of {chunk}, {name}")


def test_without_jit():
    """Called as they are, the functions give what they give under jit."""
    case, objective, batch = setting("residual")
    expected = compare("residual").ours
    for kind, make in OPERATORS.items():
        for verb in VERBS:
            for name, matrix in getattr(make(objective), verb)(case.params, batch).items():
                close(matrix, expected[name_of(kind, verb)][name], f"{kind} {verb} {name}")
    for method in ("kfra", "kflr"):
        _, curvature = kfgn.value_grad_and_curvature(objective, method)(case.params, batch)
        for name, factors in curvature.factors.items():
            for found, matrix in zip(factors, expected[method]["factors"][name], strict=True):
                close(found, matrix, f"{method} {name}")


def test_objective_is_what_it_says():
    """The mean of the losses, and half the squared norm of the parameters times l2."""
    case, objective, batch = setting("tanh")
    truth = compare("tanh").truth
    squares = sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(case.params))
    close(objective.mean_loss(case.params, batch), np.mean(truth.losses))
    close(objective.penalty(case.params), L2 / 2 * squares)
    close(objective(case.params, batch), np.mean(truth.losses) + L2 / 2 * squares)


def test_directions_may_be_partial():
    """A name that is absent from a direction stands for zeros."""
    case, objective, batch = setting("tanh")
    comparison = compare("tanh")
    _, curvature = jax.jit(kfgn.value_grad_and_curvature(objective))(case.params, batch)
    place = comparison.index["second"].block
    direction = np.zeros_like(comparison.direction)
    direction[place[:-1]] = comparison.direction[place[:-1]]
    part = {"second/w": jnp.asarray(direction[place[:-1]])}
    close(curvature.linearized(part), comparison.truth.jacobian @ direction)
    second = {**case.params["second"], "w": case.params["second"]["w"] + part["second/w"]}
    close(curvature.displaced(part), objective({**case.params, "second": second}, batch))
    for of in (curvature.linearized, curvature.displaced):  # a tree is not what they expect
        with pytest.raises(ParameterError, match="by name"):
            of(case.params)


# Values that the recursions do not carry.


def complex_across_a_layer(p, x):
    spectrum = jnp.fft.fft(jnp.tanh(dense(p["first"], x)), axis=1)
    h = dense(p["second"], jnp.real(spectrum))
    return dense(p["out"], jnp.real(spectrum * h.astype(spectrum.dtype)))


def test_complex_values_across_a_layer_are_refused():
    """Their imaginary parts would be lost; within a node they do no harm ("fourier")."""
    case, objective, batch = setting("residual")
    objective = kfgn.Objective(complex_across_a_layer, objective.loss)
    params = {name: case.params[name] for name in ("first", "second", "out")}
    with pytest.raises(kfgn.errors.ModelError, match="before the layer"):
        kfgn.value_grad_and_curvature(objective)(params, batch)
