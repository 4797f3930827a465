"""Products and dense matrices of all parameters against jax.hessian and jax.jacobian."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables.comparison import L2, close, setting
from tests.tables.dense import quick_jit
from tests.tables.losses import LOSSES

COUNT = 5
CASES = [("tanh", "one_hot"), ("tanh", "mixture"), ("tree_outputs", "gaussian")]
cases = pytest.mark.parametrize(("model", "loss"), CASES)
penalty = pytest.mark.parametrize("l2", [False, True])


class Truth(NamedTuple):
    """One case, with P parameters and K outputs."""

    objective: kfgn.Objective
    params: Any
    batch: Any
    vector: Any  # a random one, like params
    flat: np.ndarray  # the same, `[P]`
    hessian: np.ndarray  # of the mean loss, `[P, P]`
    jacobian: np.ndarray  # `[N, K, P]`
    outputs: np.ndarray  # the loss's Hessian in the outputs, `[N, K, K]`
    projected: np.ndarray  # the same without negative eigenvalues

    @property
    def gauss_newton(self) -> np.ndarray:
        """The mean of `J'BJ`, `[P, P]`."""
        parts = (self.jacobian, self.projected, self.jacobian)
        return np.einsum("nkp,nkl,nlq->pq", *parts) / COUNT

    @property
    def penalty(self) -> np.ndarray:
        return L2 * np.eye(self.flat.size)


@functools.cache
def truth_of(model: str, loss: str) -> Truth:
    case, objective, batch = setting(model, loss, count=COUNT)
    reference = LOSSES[loss].reference
    start, unravel = ravel_pytree(case.params)

    @quick_jit
    def everything(flat, inputs, targets):
        def mean_loss(p):
            return jnp.mean(jax.vmap(reference)(case.model(unravel(p), inputs), targets))

        def outputs_of(p, x):
            outputs = case.model(unravel(p), jax.tree.map(lambda a: a[None], x))
            return ravel_pytree(jax.tree.map(lambda a: a[0], outputs))[0]

        def curvature(x, y):
            outputs = case.model(unravel(flat), jax.tree.map(lambda a: a[None], x))
            o, as_outputs = ravel_pytree(jax.tree.map(lambda a: a[0], outputs))
            return jax.hessian(lambda o: reference(as_outputs(o), y))(o)

        jacobian = jax.vmap(lambda x: jax.jacobian(lambda p: outputs_of(p, x))(flat))(inputs)
        return jax.hessian(mean_loss)(flat), jacobian, jax.vmap(curvature)(inputs, targets)

    hessian, jacobian, outputs = map(np.asarray, everything(start, *batch))
    values, vectors = np.linalg.eigh(outputs)
    projected = (vectors * np.maximum(values, 0)[:, None]) @ vectors.swapaxes(1, 2)
    flat = np.random.default_rng(1).normal(size=start.shape)
    vector = unravel(jnp.asarray(flat))
    rest = (hessian, jacobian, outputs, projected)
    return Truth(objective, case.params, batch, vector, flat, *rest)


@pytest.mark.usefixtures("x64")
@cases
@penalty
def test_dense_matrices(model, loss, l2):
    """The whole Hessian and Gauss-Newton matrix, with and without the penalty."""
    truth = truth_of(model, loss)
    for function, expected in (
        (kfgn.curvature.dense_hessian, truth.hessian),
        (kfgn.curvature.dense_gauss_newton, truth.gauss_newton),
    ):
        found = quick_jit(function(truth.objective, l2=l2))(truth.params, truth.batch)
        close(found, expected + l2 * truth.penalty, function.__name__)


@pytest.mark.usefixtures("x64")
@cases
def test_outputs(model, loss):
    """J of every example in the order of the named leaves, and B with and without projection."""
    truth = truth_of(model, loss)
    objective = truth.objective
    close(
        quick_jit(kfgn.curvature.output_jacobian(objective))(truth.params, truth.batch),
        truth.jacobian,
    )
    for gauss_newton, expected in ((False, truth.outputs), (True, truth.projected)):
        function = kfgn.curvature.output_hessian(objective, gauss_newton=gauss_newton)
        close(quick_jit(function)(truth.params, truth.batch), expected)
    convex = LOSSES[loss].convex
    assert convex == np.allclose(truth.outputs, truth.projected, atol=1e-12)


@pytest.mark.usefixtures("x64")
@cases
def test_products_in_chunks(model, loss):
    """The matrices times a vector: all at once, one by one, with a remainder, above the count."""
    truth = truth_of(model, loss)
    for function, matrix in (
        (kfgn.curvature.hessian_vector_product, truth.hessian),
        (kfgn.curvature.gauss_newton_vector_product, truth.gauss_newton),
    ):
        for chunk_size in (None, 1, 2, COUNT, 7):
            product = quick_jit(function(truth.objective, l2=True, chunk_size=chunk_size))
            found = product(truth.params, truth.batch, truth.vector)
            assert jax.tree.structure(found) == jax.tree.structure(truth.params)
            close(ravel_pytree(found)[0], (matrix + truth.penalty) @ truth.flat, str(chunk_size))


@pytest.mark.usefixtures("x64")
def test_defaults_leave_the_penalty_out():
    truth = truth_of("tanh", "one_hot")
    found = kfgn.curvature.hessian_vector_product(truth.objective)(
        truth.params, truth.batch, truth.vector
    )
    close(ravel_pytree(found)[0], truth.hessian @ truth.flat)


def wide(count: int) -> tuple[kfgn.Objective, Any, Any]:
    """A network whose activations take far more memory than its parameters and inputs."""

    def model(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    shapes = {"a": (2, 256), "b": (256, 256), "c": (256, 2)}
    params = {name: jnp.full(shape, 0.01) for name, shape in shapes.items()}
    inputs = jnp.ones((count, 2))
    return kfgn.Objective(model, kfgn.losses.half_squared_error), params, (inputs, inputs)


@pytest.mark.parametrize(
    "function", [kfgn.curvature.hessian_vector_product, kfgn.curvature.gauss_newton_vector_product]
)
def test_memory_does_not_grow_with_the_batch(function):
    """Sixteen times the examples in chunks of the same size take about the same memory."""

    def temporary(count, chunk_size):
        objective, params, batch = wide(count)
        product = quick_jit(function(objective, chunk_size=chunk_size))
        compiled = product.lower(params, batch, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(256, 64), temporary(4096, 64)
    assert many < 1.2 * few
    assert temporary(4096, None) > 5 * many


def test_half_precision_parameters():
    """Chunks are summed in float32, and the product has the dtype of the parameters."""
    objective, params, batch = wide(6)
    params, (inputs, _) = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, batch))
    for function in (
        kfgn.curvature.hessian_vector_product,
        kfgn.curvature.gauss_newton_vector_product,
    ):
        arguments = (params, (inputs, inputs), params)
        whole = jax.jit(function(objective, l2=True))(*arguments)
        parts = jax.jit(function(objective, l2=True, chunk_size=4))(*arguments)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
            assert a.dtype == b.dtype == jnp.bfloat16
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.max(np.abs(a - b)) <= 0.05 * np.max(np.abs(a))


# The rank.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", ["squared_error", "one_hot", "sigmoid", "mixture"])
def test_rank(loss):
    """Appendix E: N times the rank of the output Hessian, where there are enough parameters."""
    case, objective, batch = setting("tanh", loss, count=3)

    @quick_jit
    def everything(params, batch):
        return (
            kfgn.curvature.gauss_newton_rank(objective)(params, batch),
            kfgn.curvature.dense_gauss_newton(objective)(params, batch),
            kfgn.curvature.output_hessian(objective, gauss_newton=True)(params, batch),
        )

    rank, dense, output = map(np.asarray, everything(case.params, batch))
    assert rank == np.linalg.matrix_rank(dense, tol=1e-12 * np.linalg.norm(dense, 2))
    assert rank == np.sum(np.linalg.matrix_rank(output)) < dense.shape[0]
    if loss == "one_hot":
        assert rank == 3 * 2


@pytest.mark.usefixtures("x64")
def test_rank_of_repeated_examples_and_tolerance():
    """The same examples again add nothing; a tolerance of 1 leaves nothing above it."""
    case, objective, batch = setting("tanh", count=3)
    rank = quick_jit(kfgn.curvature.gauss_newton_rank(objective))
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)
    assert rank(case.params, twice) == rank(case.params, batch)
    assert rank(case.params, batch, 1.0) == 0
    assert 0 < rank(case.params, batch, 0.3) < rank(case.params, batch)


def test_rank_is_at_most_the_number_of_parameters():
    """Many examples, few parameters."""
    objective = kfgn.Objective(lambda p, x: x @ p["w"], kfgn.losses.half_squared_error)
    inputs = jax.random.normal(jax.random.key(0), (20, 2))
    rank = kfgn.curvature.gauss_newton_rank(objective)(
        {"w": jnp.ones((2, 3))}, (inputs, jnp.ones((20, 3)))
    )
    assert rank == 6


# Bad input.

MATRICES = (kfgn.curvature.dense_hessian, kfgn.curvature.dense_gauss_newton)
PRODUCTS = (kfgn.curvature.hessian_vector_product, kfgn.curvature.gauss_newton_vector_product)


@pytest.mark.parametrize(
    "function",
    [*MATRICES, *PRODUCTS, kfgn.curvature.output_jacobian, kfgn.curvature.output_hessian],
)
def test_not_an_objective(function):
    with pytest.raises(kfgn.errors.OptionError, match="Objective, found a function"):
        function(lambda p, x: x)


@pytest.mark.parametrize("function", [*MATRICES, *PRODUCTS])
def test_flags_are_checked(function):
    with pytest.raises(kfgn.errors.OptionError, match="l2 must be True or False"):
        function(wide(2)[0], l2=0.1)


@pytest.mark.parametrize("function", PRODUCTS)
@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "4"])
def test_chunk_sizes_are_checked(function, chunk_size):
    with pytest.raises(kfgn.errors.OptionError, match="chunk_size must be None or an integer"):
        function(wide(2)[0], chunk_size=chunk_size)


@pytest.mark.parametrize("function", PRODUCTS)
def test_vectors_are_checked(function):
    objective, params, batch = wide(2)
    product = function(objective)
    for vector, message in (
        ({"a": params["a"]}, "must be a pytree like params"),
        ({**params, "c": params["c"].T}, r"'c' must have shape \(256, 2\)"),
        ({**params, "c": params["c"].astype(jnp.bfloat16)}, "found .* dtype bfloat16"),
    ):
        with pytest.raises(kfgn.errors.ParameterError, match=message):
            product(params, batch, vector)


def test_large_matrices_are_refused():
    """The error names the size."""
    objective = kfgn.Objective(lambda p, x: x @ p["w"], kfgn.losses.half_squared_error)
    params, batch = {"w": jnp.zeros((300, 300))}, (jnp.zeros((40, 300)), jnp.zeros((40, 300)))
    for function in MATRICES:
        with pytest.raises(kfgn.errors.OptionError, match=r"90000 x 90000 entries \(30.2 GiB\)"):
            function(objective)(params, batch)
    for function in (kfgn.curvature.output_jacobian, kfgn.curvature.gauss_newton_rank):
        with pytest.raises(kfgn.errors.OptionError, match=r"40 x 300 x 90000 entries \(4.0 GiB\)"):
            function(objective)(params, batch)
    one = {"w": jnp.zeros((1, 300))}
    many = (jnp.zeros((6000, 1)), jnp.zeros((6000, 300)))
    with pytest.raises(kfgn.errors.OptionError, match="6000 x 300 x 300 entries"):
        kfgn.curvature.output_hessian(objective)(one, many)


def test_targets_are_checked_in_chunks():
    """Values outside the loss's domain, also where the batch is a constant of a jit."""
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(lambda p, x: x @ p["w"], loss)
    params, inputs = {"w": jnp.zeros((2, 3))}, jnp.ones((4, 2))
    product = kfgn.curvature.hessian_vector_product(objective, chunk_size=2)
    for call in (product, lambda *a: jax.jit(lambda v: product(*a[:2], v))(a[2])):
        with pytest.raises(kfgn.errors.LossError, match="class indices"):
            call(params, (inputs, jnp.full(4, 3)), params)
    with pytest.raises(kfgn.errors.BatchError, match="differ in their number"):
        product(params, (inputs, jnp.zeros(3, int)), params)


def test_tolerance_is_checked():
    objective, params, batch = wide(2)
    with pytest.raises(kfgn.errors.OptionError, match="tol must be finite and at least 0"):
        kfgn.curvature.gauss_newton_rank(objective)(params, batch, -1.0)
