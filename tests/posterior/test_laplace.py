"""Laplace's approximation beside closed forms, and matrices that jax differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.errors import LayerError, OptionError

N, TAU = 12, 0.7
# Inverses and eigendecompositions of matrices of condition below 1e4, in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}

pytestmark = pytest.mark.usefixtures("x64")


def line(params, x):
    return x @ params["w"] + params["b"]


def regression(outputs=2):
    """Data, the ridge regression's solution, and the design matrix with its column of ones."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (N, 3))
    y = jax.random.normal(keys[1], (N, outputs))
    design = jnp.concatenate([x, jnp.ones((N, 1))], axis=1)
    solution = jnp.linalg.solve(design.T @ design + TAU * jnp.eye(4), design.T @ y)
    return (x, y), {"w": solution[:3], "b": solution[3]}, design


def posterior_of(structure="kronecker", **options):
    batch, params, _ = regression()
    objective = kfgn.Objective(line, kfgn.losses.half_squared_error, l2=TAU / N)
    return kfgn.posterior.laplace(objective, params, batch, structure=structure, **options)


@pytest.mark.parametrize("structure", ["kronecker", "blocks", "full"])
def test_bayesian_linear_regression(structure):
    """Predictions and evidence of a linear model are exact, by every structure but the diagonal."""
    posterior = posterior_of(structure)
    (x, y), params, design = regression()
    covariance = jnp.linalg.inv(design.T @ design + TAU * jnp.eye(4))
    outputs, found = posterior.predict(line, x, chunk_size=5)
    np.testing.assert_allclose(outputs, line(params, x), **CLOSE)
    variance = jnp.einsum("ni,ij,nj->n", design, covariance, design)
    np.testing.assert_allclose(found, variance[:, None, None] * jnp.eye(2), **CLOSE)

    def evidence(tau):
        gram = design @ design.T / tau + jnp.eye(N)
        fit = jnp.sum(y * jnp.linalg.solve(gram, y))
        return -(fit + 2 * jnp.linalg.slogdet(gram)[1]) / 2

    np.testing.assert_allclose(posterior.log_marginal_likelihood(), evidence(TAU), **CLOSE)
    # Elsewhere the solution would move with the prior: its derivative at this prior is 0.
    slope = jax.grad(posterior.log_marginal_likelihood)(TAU)
    np.testing.assert_allclose(slope, jax.grad(evidence)(TAU), **CLOSE)


def net(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["c"] * params["scale"]


def network():
    keys = jax.random.split(jax.random.key(1), 5)
    params = {
        "a": {"w": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))},
        "c": jax.random.normal(keys[2], (4, 3)),
        "scale": jnp.array(0.8),
    }
    x = jax.random.normal(keys[3], (N, 3))
    labels = jax.random.randint(keys[4], (N,), 0, 3)
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    return kfgn.Objective(net, loss), params, (x, labels)


def true_matrices(params, x):
    """The Jacobian `[N, K, P]`, and N C by jax's Jacobian and the softmax's Hessian."""
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda p: net(unravel(p), x))(flat)
    p = jax.nn.softmax(net(params, x))
    hessian = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    return jacobian, jnp.einsum("nki,nkl,nlj->ij", jacobian, hessian, jacobian)


def masked(matrix, params, structure):
    """What a structure has of it: all, each block, or the diagonal."""
    marks = {"a": {"w": 0.0, "b": 0.0}, "c": 1.0, "scale": 2.0}
    block = ravel_pytree(jax.tree.map(jnp.full_like, params, marks))[0]
    if structure == "diagonal":
        return jnp.diag(jnp.diag(matrix))
    return matrix if structure == "full" else jnp.where(block[:, None] == block, matrix, 0)


@pytest.mark.parametrize("structure", ["blocks", "full", "diagonal"])
def test_exact_structures(structure):
    """Products with Σ, predictions, evidence and draws of a network, against dense matrices."""
    objective, params, (x, labels) = network()
    posterior = kfgn.posterior.laplace(
        objective, params, (x, labels), structure=structure, prior_precision=TAU
    )
    jacobian, matrix = true_matrices(params, x)
    flat, unravel = ravel_pytree(params)
    precision = masked(matrix, params, structure) + TAU * jnp.eye(flat.size)
    covariance = jnp.linalg.inv(precision)

    @jax.jit
    def found(posterior):
        v = unravel(jnp.cos(jnp.arange(flat.size)))
        solved, predicted = posterior.solve(v), posterior.predict(net, x)[1]
        return ravel_pytree(solved)[0], predicted, posterior.log_marginal_likelihood()

    solved, predicted, evidence = found(posterior)
    np.testing.assert_allclose(solved, covariance @ jnp.cos(jnp.arange(flat.size)), **CLOSE)
    through = jnp.einsum("nki,ij,nlj->nkl", jacobian, covariance, jacobian)
    np.testing.assert_allclose(predicted, through, **CLOSE)
    volume = flat.size * jnp.log(TAU) - jnp.linalg.slogdet(precision)[1]
    expected = -N * objective(params, (x, labels)) + (volume - TAU * flat @ flat) / 2
    np.testing.assert_allclose(evidence, expected, **CLOSE)

    draws = jax.vmap(lambda p: ravel_pytree(p)[0])(posterior.sample(jax.random.key(2), 20_000))
    # Whitened, they have the covariance I, each entry with an error of about 1/sqrt(20,000).
    white = (draws - flat) @ jnp.linalg.cholesky(precision)
    np.testing.assert_allclose(jnp.cov(white.T), jnp.eye(flat.size), atol=5 / 20_000**0.5 * 2**0.5)
    np.testing.assert_allclose(jnp.mean(white, axis=0), 0, atol=5 / 20_000**0.5)


@pytest.mark.loose_dtypes  # laplax's own arithmetic
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_laplax_has_the_same_numbers(structure):
    """Products with Σ, and the evidence, of what laplax has as well; skipped where it is not."""
    pytest.importorskip("laplax", reason="pip install laplax")
    from laplax.curv.cov import estimate_curvature, set_posterior_fn
    from laplax.curv.ggn import create_ggn_mv
    from laplax.eval.likelihood import marginal_log_likelihood

    objective, params, (x, labels) = network()
    own = kfgn.posterior.laplace(
        objective, params, (x, labels), structure=structure, prior_precision=TAU
    )

    def model(input, params):
        return net(params, input)

    def one(input, params):
        return net(params, input[None])[0]

    def twice_the_loss(outputs, labels):  # which laplax halves, as squares are
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=1)
        return -2 * jnp.sum(chosen)

    data = {"input": x, "target": labels}
    product = create_ggn_mv(one, params, data, "cross_entropy")
    curvature = estimate_curvature(structure, product, layout=params)
    posterior = set_posterior_fn(structure, curvature, layout=params)({"prior_prec": TAU})
    v = jax.tree.map(jnp.cos, params)
    found = ravel_pytree(posterior.cov_mv(posterior.state)(v))[0]
    np.testing.assert_allclose(ravel_pytree(own.solve(v))[0], found, **CLOSE)

    evidence = marginal_log_likelihood(
        curvature, {"prior_prec": TAU}, data, model, params, twice_the_loss, structure
    )
    np.testing.assert_allclose(own.log_marginal_likelihood(), evidence, **CLOSE)


def test_kronecker_is_the_factors_with_the_prior_added_exactly():
    objective, params, batch = network()
    posterior = kfgn.posterior.laplace(objective, params, batch, prior_precision=TAU)
    _, curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    q, g = curvature.factors["a"]
    dense = N * jnp.kron(q, g) + TAU * jnp.eye(16)
    v = jax.tree.map(jnp.cos, params)
    solved = posterior.solve(v)
    rows = jnp.concatenate([v["a"]["w"], v["a"]["b"][None]])
    expected = jnp.linalg.solve(dense, rows.reshape(-1)).reshape(4, 4)
    np.testing.assert_allclose(solved["a"]["w"], expected[:3], **CLOSE)
    np.testing.assert_allclose(solved["a"]["b"], expected[3], **CLOSE)


def test_parameter_in_no_layer_has_its_own_exact_block():
    (x, y), _, _ = regression()
    v = jnp.array([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]])

    def model(v, x):
        return jnp.tanh(x @ (v / jnp.linalg.norm(v)))

    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    posterior = kfgn.posterior.laplace(objective, v, (x, y), prior_precision=TAU)
    jacobian = jax.jacobian(model)(v, x).reshape(-1, 6)
    expected = jnp.linalg.solve(jacobian.T @ jacobian + TAU * jnp.eye(6), v.reshape(-1))
    np.testing.assert_allclose(posterior.solve(v).reshape(-1), expected, **CLOSE)


def test_last_layer_alone():
    """The others stay at the mean, without variance; together or by itself, it is one block."""
    objective, params, batch = network()
    for structure in ("blocks", "full"):
        posterior = kfgn.posterior.laplace(
            objective, params, batch, structure=structure, layers=["c"], prior_precision=TAU
        )
        jacobian, matrix = true_matrices(params, batch[0])
        own = slice(16, 28)
        covariance = jnp.linalg.inv(matrix[own, own] + TAU * jnp.eye(12))
        found = posterior.predict(net, batch[0])[1]
        through = jnp.einsum("nki,ij,nlj->nkl", jacobian[..., own], covariance, jacobian[..., own])
        np.testing.assert_allclose(found, through, **CLOSE)
        drawn = posterior.sample(jax.random.key(0))
        assert jnp.all(drawn["a"]["w"] == params["a"]["w"]) and drawn["scale"] == params["scale"]
        assert not jnp.any(drawn["c"] == params["c"])


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "blocks", "full"])
def test_iterator_of_batches(structure):
    """Parts of the data of unlike size give the whole's, by their numbers of examples.

    Kronecker factors are averaged each; a diagonal and blocks are means as they stand.
    """
    objective, params, (x, labels) = network()
    options = {"structure": structure, "prior_precision": TAU, "method": "kflr"}
    whole = kfgn.posterior.laplace(objective, params, (x, labels), **options)
    parts = iter([(x[:5], labels[:5]), (x[5:], labels[5:])])
    found = kfgn.posterior.laplace(objective, params, parts, **options)
    v = jax.tree.map(jnp.cos, params)
    for a, b in zip(jax.tree.leaves(found.solve(v)), jax.tree.leaves(whole.solve(v)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    np.testing.assert_allclose(found.examples, N)
    np.testing.assert_allclose(found.mean_loss, whole.mean_loss, **CLOSE)


def test_most_evidence():
    """The evidence is flat there, and falls on both sides; a prior may be given by block."""
    posterior = posterior_of("full").with_most_evidence()
    tau = posterior.prior_precision
    assert abs(jax.grad(posterior.log_marginal_likelihood)(tau)) < 1e-8
    best = posterior.log_marginal_likelihood()
    assert all(posterior.log_marginal_likelihood(f * tau) < best for f in (0.9, 1.1))
    by_block = posterior.with_prior_precision({"": tau})
    np.testing.assert_allclose(by_block.log_marginal_likelihood(), best, **CLOSE)


def test_sampled_outputs():
    """Of a linear model their covariance is the predicted one, within 5 standard errors."""
    posterior, (x, _) = posterior_of(), regression()[0]
    count = 20_000
    draws = posterior.sampled_outputs(line, x[:1], jax.random.key(3), count)[:, 0]
    variance = posterior.predict(line, x[:1])[1][0]
    np.testing.assert_allclose(
        jnp.cov(draws.T), variance, atol=5 * float(variance[0, 0]) * (2 / count) ** 0.5
    )


def test_influence_is_the_derivative_by_an_examples_weight():
    batch, params, design = regression()
    objective = kfgn.Objective(line, kfgn.losses.half_squared_error, l2=TAU / N)
    posterior = kfgn.posterior.laplace(objective, params, batch)
    test = (batch[0][:3] + 1, batch[1][:3])

    def losses(weights):
        matrix = design.T * weights @ design + TAU * jnp.eye(4)
        solution = jnp.linalg.solve(matrix, design.T * weights @ batch[1])
        rows = jnp.concatenate([test[0], jnp.ones((3, 1))], axis=1)
        return jnp.sum(jnp.square(rows @ solution - test[1]), axis=1) / 2

    found = kfgn.posterior.influence(posterior, objective, batch, test, chunk_size=5)
    np.testing.assert_allclose(found, -jax.jacobian(losses)(jnp.ones(N)), **CLOSE)


def test_weights_and_convolutions():
    """Every structure has the weights; blocks of a convolution are those of jax."""

    def model(kernel, x):
        return jax.lax.conv(x[:, None], kernel, (1,), "VALID").reshape(len(x), -1)

    keys = jax.random.split(jax.random.key(4), 4)
    kernel, x = jax.random.normal(keys[0], (2, 1, 3)), jax.random.normal(keys[1], (5, 6))
    y, weights = jax.random.normal(keys[2], (5, 8)), jax.random.uniform(keys[3], (5,))
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    jacobian = jax.jacobian(model)(kernel, x).reshape(5, 8, -1)
    matrix = jnp.einsum("n,nki,nkj->ij", weights, jacobian, jacobian) + TAU * jnp.eye(6)
    for structure in ("blocks", "full"):
        posterior = kfgn.posterior.laplace(
            objective, kernel, (x, y, weights), structure=structure, prior_precision=TAU
        )
        found = posterior.solve(kernel).reshape(-1)
        np.testing.assert_allclose(found, jnp.linalg.solve(matrix, kernel.reshape(-1)), **CLOSE)


def test_errors():
    objective, params, batch = network()
    with pytest.raises(OptionError, match="no penalty to be a prior: pass prior_precision="):
        kfgn.posterior.laplace(objective, params, batch)
    with pytest.raises(LayerError, match="layers names 'd', the model has the blocks 'a', 'c'"):
        kfgn.posterior.laplace(objective, params, batch, prior_precision=1.0, layers=["d"])
    with pytest.raises(OptionError, match="gave no batch"):
        kfgn.posterior.laplace(objective, params, iter([]), prior_precision=1.0)
    with pytest.raises(OptionError, match=r"an entry for each of \['b', 'w'\]|found \['x'\]"):
        posterior_of().with_prior_precision({"x": 1.0})
    with pytest.raises(OptionError, match="say how many examples"):
        kfgn.posterior.laplace(kfgn.sum_of([objective]), params, (batch,), prior_precision=1.0)
