"""Spectra of blocks, and Lanczos's method, beside eigenvalues of dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.diagnostics import cosine, largest_eigenvalues, spectral_density, spectrum
from kfgn.errors import OptionError

# Eigenvalues of symmetric matrices in float64, to a multiple of the largest.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

pytestmark = pytest.mark.usefixtures("x64")


def problem():
    """A network whose Gauss-Newton matrix has rank 8 of 17: Lanczos has to start anew."""

    def model(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]

    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "w": jax.random.normal(keys[0], (2, 3)),
        "b": jax.random.normal(keys[1], (3,)),
        "v": jax.random.normal(keys[2], (3, 2)),
    }
    batch = jax.random.normal(keys[3], (3, 2)), jax.random.normal(keys[4], (3, 2))
    return kfgn.Objective(model, kfgn.losses.half_squared_error), params, batch


def test_of_factors_and_blocks():
    objective, params, batch = problem()
    _, curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    dense = [jnp.linalg.eigvalsh(jnp.kron(*f)) for f in curvature.factors.values()]
    found = spectrum(curvature, damping=0.1)
    expected = jnp.sort(jnp.concatenate(dense)) + 0.1
    np.testing.assert_allclose(found.eigenvalues, expected, **CLOSE)
    np.testing.assert_allclose(found.trace, expected.sum(), **CLOSE)
    np.testing.assert_allclose(found.log_determinant, jnp.log(expected).sum(), **CLOSE)
    np.testing.assert_allclose(found.condition, expected[-1] / expected[0], **CLOSE)
    blocks = kfgn.hessian(objective).blocks(params, batch)
    expected = jnp.sort(jnp.concatenate([jnp.linalg.eigvalsh(b) for b in blocks.values()]))
    np.testing.assert_allclose(spectrum(blocks).eigenvalues, expected, **CLOSE)
    with pytest.raises(OptionError, match=r"found a \w+ of shape \(3,\)"):
        spectrum(jnp.ones(3))


@pytest.mark.parametrize("kind", [kfgn.hessian, kfgn.gauss_newton])
def test_lanczos(kind):
    """With as many products as parameters it is exact; the density's moments are before that."""
    objective, params, batch = problem()
    operator = kind(objective)
    dense = operator.dense(params, batch)
    expected = jnp.linalg.eigvalsh(dense)
    found = largest_eigenvalues(operator, params, batch, jax.random.key(1), count=15)
    np.testing.assert_allclose(found, expected[::-1], **CLOSE)
    first = largest_eigenvalues(operator, params, batch, jax.random.key(1), steps=9)
    np.testing.assert_allclose(first, expected[-1:], rtol=1e-3)
    # One direction v of 4 steps: v'A^k v / v'v for k below 8, and v is what any key gives.
    key = jax.random.key(2)
    density = spectral_density(operator, params, batch, key, steps=4, probes=1)
    v = jax.random.normal(jax.random.split(jax.random.split(key, 1)[0], 5)[0], (15,))
    for k in range(8):
        moment = v @ jnp.linalg.matrix_power(dense, k) @ v / (v @ v)
        np.testing.assert_allclose(density.weights @ density.nodes**k, moment, **CLOSE)


def test_density_of_many_probes():
    """The mean of the nodes is tr A / P, within 5 standard errors of Hutchinson's estimate."""
    objective, params, batch = problem()
    operator, count = kfgn.gauss_newton(objective), 400
    dense = operator.dense(params, batch)
    density = spectral_density(operator, params, batch, jax.random.key(3), steps=5, probes=count)
    error = jnp.sqrt(2 / count) * jnp.linalg.norm(dense) / len(dense)
    assert abs(density.weights @ density.nodes - jnp.trace(dense) / len(dense)) < 5 * error
    points = jnp.linspace(-3, density.nodes.max() + 3, 4001)
    np.testing.assert_allclose(  # the trapezoid rule of a smooth function that vanishes outside
        jnp.trapezoid(density.smooth(points, width=0.3), points), 1, rtol=1e-8
    )


def test_matrices_that_end_early():
    """Zero, and a multiple of the identity, whose products have one direction."""
    for factor in (0.0, 2.0):
        objective = kfgn.Objective(lambda w, x, c=factor: c * x @ w, kfgn.losses.half_squared_error)
        batch = jnp.eye(3), jnp.zeros((3, 1))
        found = largest_eigenvalues(
            kfgn.hessian(objective), jnp.ones((3, 1)), batch, jax.random.key(0), count=3
        )
        np.testing.assert_allclose(found, jnp.full(3, factor**2 / 3), **CLOSE)


def test_cosine():
    u, v = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(0.0)}, {"a": jnp.ones(2), "b": jnp.ones(())}
    np.testing.assert_allclose(cosine(u, v), 7 / (5 * 3**0.5), rtol=1e-14)
    tiny = jax.tree.map(lambda x: 1e-200 * x, u)  # whose square would be 0
    np.testing.assert_allclose(cosine(tiny, v), 7 / (5 * 3**0.5), rtol=1e-14)
    np.testing.assert_allclose(cosine(u, jax.tree.map(jnp.negative, u)), -1, rtol=1e-14)


def test_errors():
    objective, params, batch = problem()
    with pytest.raises(OptionError, match=r"must be kfgn.hessian\(objective\)"):
        largest_eigenvalues(objective, params, batch, jax.random.key(0))
    with pytest.raises(OptionError, match="count is 5, but there are 4 Ritz values"):
        largest_eigenvalues(
            kfgn.hessian(objective), params, batch, jax.random.key(0), count=5, steps=4
        )
