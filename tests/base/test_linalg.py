"""Inverses, Kronecker algebra and the quadratic model against dense numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import kfgn
from kfgn.base import kronecker, linalg
from kfgn.base import spd_inverse as spd
from kfgn.optimizers import quadratic_model as quadratic
from tests.tables.comparison import by_path, close, setting
from tests.tables.dense import dense_truth
from tests.tables.losses import LOSSES

# Around the sizes at which the algorithm changes, and some between.
SIZES = (1, 2, 7, 50, 127, 128, 129, 200, 257, 300, 590, 600)


@functools.cache
def rotation(size):
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]


def spd_matrix(size, condition, scale=1.0):
    """A random matrix with eigenvalues from `scale / condition` to `scale`."""
    vectors = rotation(size)
    values = np.geomspace(1 / condition, 1, size) if size > 1 else np.ones(1)
    matrix = scale * (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2


def lapack_inverse(matrix):
    """By Cholesky in the matrix's own precision, as spd does it."""
    factor = scipy.linalg.cholesky(matrix, lower=True)
    return scipy.linalg.cho_solve((factor, True), np.eye(len(matrix), dtype=matrix.dtype))


def precise_inverse(matrix, columns):
    """In float64, and for float64 with a step of Newton's iteration in extended precision."""
    if matrix.dtype == np.float32:
        return np.linalg.inv(matrix.astype(np.float64))[:, columns]
    x, a = np.linalg.inv(matrix).astype(np.longdouble), matrix.astype(np.longdouble)
    return x[:, columns] + x @ (np.eye(len(matrix))[:, columns] - a @ x[:, columns])


all_inverses = jax.jit(spd.spd_inverses)
extended = np.finfo(np.longdouble).eps < 1e-18


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        pytest.param(
            np.float64,
            marks=pytest.mark.skipif(not extended, reason="nothing more precise to compare with"),
        ),
    ],
    ids=["float32", "float64"],
)
def test_inverses_are_as_good_as_lapack(dtype, condition):
    """The error of each is at most a small multiple of that of LAPACK's inverse."""
    if dtype is np.float32 and condition == 1e6:
        condition = 1e5  # beyond, rounding the matrix to float32 may leave it indefinite
    matrices = [spd_matrix(size, condition).astype(dtype) for size in SIZES]
    shifts = [dtype(0)] * len(matrices)
    with jax.enable_x64(dtype is np.float64):
        found = all_inverses([jnp.asarray(a) for a in matrices], shifts)
    for matrix, inverse in zip(matrices, found, strict=True):
        # Extended precision has no fast products: some columns there, all in float32.
        columns = np.arange(0, len(matrix), 1 if dtype is np.float32 else 1 + len(matrix) // 40)
        exact = precise_inverse(matrix, columns)
        scale = np.max(np.abs(exact))
        error = np.max(np.abs(np.asarray(inverse)[:, columns] - exact)) / scale
        lapack = np.max(np.abs(lapack_inverse(matrix)[:, columns] - exact)) / scale
        # Both errors are roundoff, of random size: hence 8 times, and a few eps.
        assert error <= 8 * lapack + 8 * np.finfo(dtype).eps, len(matrix)
        assert inverse.dtype == dtype
        close(inverse, np.asarray(inverse).T, "symmetry", digits=100 * np.finfo(dtype).eps)


@pytest.mark.usefixtures("x64")
def test_shifts_and_scales():
    """Each matrix has a shift of its own; scales far from 1 do no harm."""
    scales = (1e-10, 1e-3, 1.0, 1e10)
    matrices = [spd_matrix(6, 1e2, scale=s) for s in scales] + [np.zeros((4, 4))]
    shifts = [0.5e-10, 2e-3, 0.0, 1e9, 0.3]
    found = all_inverses([jnp.asarray(a) for a in matrices], [jnp.asarray(s) for s in shifts])
    for matrix, shift, inverse in zip(matrices, shifts, found, strict=True):
        exact = np.linalg.inv(matrix + shift * np.eye(len(matrix)))
        # A condition of 1e2 times roundoff.
        np.testing.assert_allclose(inverse, exact, rtol=0, atol=1e-11 * np.max(np.abs(exact)))


@pytest.mark.parametrize("size", [1, 5, 100, 200])
@pytest.mark.parametrize("place", ["first", "last"])
def test_not_positive_definite_is_nan(size, place):
    """Every entry, so that nobody takes a part of it for an inverse; others stay unharmed."""
    bad = np.eye(size, dtype=np.float32)
    at = 0 if place == "first" else size - 1
    bad[at, at] = -1
    others = [2 * jnp.eye(3), 2 * jnp.eye(size), 2 * jnp.eye(size + 1)]  # of its stack, too
    found = all_inverses([jnp.asarray(bad), *others], [jnp.zeros(())] * 4)
    assert np.all(np.isnan(found[0]))
    for other, inverse in zip(others, found[1:], strict=True):
        close(inverse, np.eye(len(other)) / 2, digits=1e-6)


@pytest.mark.parametrize("size", [3, 383, 384, 385, 500])
def test_symmetric_products(size):
    """`a'a` and `w M w'` by half of their blocks equal the whole products."""
    rng = np.random.default_rng(size)
    a, w = rng.normal(size=(7, size)), rng.normal(size=(size, 9)) / 3
    m = rng.normal(size=(9, 9))
    single = [jnp.asarray(x, jnp.float32) for x in (a, w, m + m.T)]
    # Sums of less than a hundred terms in float32.
    close(linalg.second_moment(single[0]), a.T @ a / 7, "moment", digits=1e-5)
    close(linalg.congruence(*single[1:]), w @ (m + m.T) @ w.T, "congruence", digits=1e-5)
    diagonal = np.diag(w @ (m + m.T) @ w.T)
    close(linalg.congruence_diagonal(*single[1:]), diagonal, "diagonal", digits=1e-5)


def test_factor_dtype():
    """At least float32, and no complaint about mixed precision in strict mode."""
    assert linalg.factor_dtype(jnp.bfloat16) == jnp.float32
    assert linalg.factor_dtype(jnp.float16, jnp.bfloat16) == jnp.float32
    with jax.enable_x64(True):
        assert linalg.factor_dtype(jnp.float32, jnp.float64) == jnp.float64


# Kronecker products, on the row-major vec.


@pytest.fixture
def factors():
    return (
        spd_matrix(4, 1e2),
        spd_matrix(3, 1e3, scale=0.2),
        np.random.default_rng(1).normal(size=(4, 3)),
    )


@pytest.mark.usefixtures("x64")
def test_kronecker_algebra(factors):
    """The product with `q ⊗ g`, beside the whole matrix."""
    q, g, v = factors
    whole = np.kron(q, g)
    jq, jg = jnp.asarray(q), jnp.asarray(g)
    close(kronecker.kronecker_matvec(jq, jg, jnp.asarray(v)).ravel(), whole @ v.ravel())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("damping", [1e-4, 1.0, 1e3])
def test_factored_inverses(factors, damping):
    """Eqs. (36)-(38): the inverse of `(q + ω√k I) ⊗ (g + √k/ω I)`, ω from the traces."""
    q, g, v = factors
    omega = np.sqrt(np.trace(q) * len(g) / (np.trace(g) * len(q)))
    root = np.sqrt(damping)
    damped = np.kron(q + omega * root * np.eye(4), g + root / omega * np.eye(3))
    expected = np.linalg.solve(damped, v.ravel()).reshape(v.shape)
    pairs = {"a": (jnp.asarray(q), jnp.asarray(g)), "b": (jnp.asarray(g), jnp.asarray(q))}
    inverses = kronecker.factored_inverses(pairs, jnp.asarray(damping))
    close(kronecker.kronecker_matvec(*inverses["a"], jnp.asarray(v)), expected)
    swapped = kronecker.kronecker_matvec(*inverses["b"], jnp.asarray(v.T))
    close(swapped, expected.T, "factors swapped")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("damping", [1e-4, 1.0, 1e3])
def test_eigen_inverse(factors, damping):
    """Eq. (35): `(q ⊗ g + k I)^-1` exactly."""
    q, g, v = factors
    damped = np.kron(q, g) + damping * np.eye(12)
    expected = np.linalg.solve(damped, v.ravel()).reshape(v.shape)
    parts = kronecker.eigen(jnp.asarray(q), jnp.asarray(g))
    close(kronecker.apply_eigen(parts, jnp.asarray(damping), jnp.asarray(v)), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("zero", ["left", "right", "both"])
def test_zero_factors(factors, zero):
    """A dead layer: nothing to balance, so ω is 1, and the damping alone is inverted."""
    q, g, v = (jnp.asarray(x) for x in factors)
    q = jnp.zeros_like(q) if zero in ("left", "both") else q
    g = jnp.zeros_like(g) if zero in ("right", "both") else g
    assert kronecker.factor_balance(q, g) == 1
    inverses = kronecker.factored_inverses({"a": (q, g)}, jnp.asarray(0.25))
    damped = np.kron(q + 0.5 * np.eye(4), g + 0.5 * np.eye(3))
    expected = np.linalg.solve(damped, np.ravel(v)).reshape(v.shape)
    close(kronecker.kronecker_matvec(*inverses["a"], v), expected)
    parts = kronecker.eigen(q, g)
    close(kronecker.apply_eigen(parts, jnp.asarray(0.25), v), v / 0.25, "eigen")


def test_balance_survives_extreme_scales():
    """Traces whose ratio leaves float32 far behind still give finite inverses."""
    q, g = 1e15 * jnp.eye(3), 1e-15 * jnp.eye(2)
    inverse = kronecker.factored_inverses({"a": (q, g)}, jnp.asarray(1e-3))["a"]
    assert np.all(np.isfinite(inverse.left)) and np.all(np.isfinite(inverse.right))


# The quadratic model.


@pytest.fixture(scope="module")
def model():
    """A network's curvature, its dense Gauss-Newton matrix, and its gradient."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        case, objective, batch = setting("residual")
        truth = dense_truth(case, LOSSES["one_hot"], batch[1])
        _, curvature = jax.jit(kfgn.value_grad_and_curvature(objective))(case.params, batch)
        gradient, unravel = jax.flatten_util.ravel_pytree(jax.grad(objective)(case.params, batch))
    return curvature, np.mean(truth.gauss_newton, axis=0), np.asarray(gradient), unravel


def directions_of(model, count):
    curvature, _, gradient, unravel = model
    vectors = np.random.default_rng(5).normal(size=(count, gradient.size))
    vectors[0] += gradient
    return vectors, [quadratic.push(curvature, by_path(unravel(jnp.asarray(v)))) for v in vectors]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("damping", [0.0, 0.3, 100.0])
def test_quadratic_model_is_minimized(model, count, damping):
    """The coefficients solve the dense problem, and nothing near them is lower."""
    curvature, matrix, gradient, _ = model
    vectors, directions = directions_of(model, count)
    step = quadratic.best_step(curvature, directions, jnp.asarray(damping))
    damped = vectors @ (matrix + damping * np.eye(len(matrix))) @ vectors.T
    slopes = vectors @ gradient
    close(step.coefficients, np.linalg.solve(damped, slopes))

    def value(c):
        return -slopes @ c + c @ damped @ c / 2

    found = np.asarray(step.coefficients)
    close(step.predicted, value(found))
    assert step.predicted < 0
    for nudge in np.concatenate([np.eye(count), -np.eye(count)]):
        assert value(found + 1e-3 * np.abs(found) * nudge) > value(found)
    combined = quadratic.combine(directions, step.coefficients)
    flat = np.concatenate([np.ravel(leaf) for leaf in combined.values()])
    close(flat, found @ vectors)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("second", ["zero", "parallel", "opposite", "tiny"])
def test_degenerate_second_direction(model, second):
    """One that adds nothing gets the coefficient 0 and leaves the first as it is alone."""
    curvature, _, _, unravel = model
    vectors, (first,) = directions_of(model, 1)
    factor = {"zero": 0.0, "parallel": 3.0, "opposite": -1.0, "tiny": 1e-12}[second]
    leaves = by_path(unravel(jnp.asarray(factor * vectors[0])))
    other = quadratic.push(curvature, leaves)
    damping = jnp.asarray(0.1)
    alone = quadratic.best_step(curvature, [first], damping)
    both = quadratic.best_step(curvature, [first, other], damping)
    close(both.coefficients, np.asarray([alone.coefficients[0], 0]))
    close(both.predicted, alone.predicted)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(12, 5, {4}), (12, 12, {12}), (12, 1, {1}), (13, 5, {5, 3}), (1000, 300, {250}), (0, 5, {1})],
)
def test_chunks_of_a_sum_leave_nothing_where_they_can(count, most, sizes):
    """What is left would be compiled as well."""
    seen = set()

    def summed(x):
        seen.add(len(x))
        return jnp.sum(x, axis=0)

    x = jnp.arange(2.0 * count).reshape(count, 2)
    found = linalg.sum_over_examples(summed, x, linalg._CHUNK_BYTES // most)
    np.testing.assert_array_equal(found, jnp.sum(x, axis=0))  # whole numbers
    assert seen - {1} == sizes - {1}
