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
from tests.tables.comparison import L2, OPERATORS, close, setting
from tests.tables.losses import LOSSES

COUNT = 5
CASES = [("tanh", "one_hot"), ("tanh", "mixture"), ("tree_outputs", "gaussian")]
cases = pytest.mark.parametrize(("model", "loss"), CASES)
penalty = pytest.mark.parametrize("with_l2", [False, True])
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)


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
    output_gradients: np.ndarray  # of each example's loss in its outputs, `[N, K]`

    @property
    def gauss_newton(self) -> np.ndarray:
        """The mean of `J'BJ`, `[P, P]`."""
        parts = (self.jacobian, self.projected, self.jacobian)
        return np.einsum("nkp,nkl,nlq->pq", *parts) / COUNT

    @property
    def empirical_fisher(self) -> np.ndarray:
        """The mean outer product of the gradients, `[P, P]`."""
        rows = np.einsum("nkp,nk->np", self.jacobian, self.output_gradients)
        return rows.T @ rows / COUNT

    @property
    def penalty(self) -> np.ndarray:
        return L2 * np.eye(self.flat.size)


@functools.cache
def truth_of(model: str, loss: str) -> Truth:
    case, objective, batch = setting(model, loss, count=COUNT)
    reference = LOSSES[loss].reference
    start, unravel = ravel_pytree(case.params)

    @jax.jit
    def everything(flat, inputs, targets):
        def mean_loss(p):
            return jnp.mean(jax.vmap(reference)(case.model(unravel(p), inputs), targets))

        def outputs_of(p, x):
            outputs = case.model(unravel(p), jax.tree.map(lambda a: a[None], x))
            return ravel_pytree(jax.tree.map(lambda a: a[0], outputs))[0]

        def curvature(x, y):
            outputs = case.model(unravel(flat), jax.tree.map(lambda a: a[None], x))
            o, as_outputs = ravel_pytree(jax.tree.map(lambda a: a[0], outputs))

            def of_outputs(o):
                return reference(as_outputs(o), y)

            return jax.hessian(of_outputs)(o), jax.grad(of_outputs)(o)

        jacobian = jax.vmap(lambda x: jax.jacobian(lambda p: outputs_of(p, x))(flat))(inputs)
        return jax.hessian(mean_loss)(flat), jacobian, *jax.vmap(curvature)(inputs, targets)

    hessian, jacobian, outputs, gradients = map(np.asarray, everything(start, *batch))
    values, vectors = np.linalg.eigh(outputs)
    projected = (vectors * np.maximum(values, 0)[:, None]) @ vectors.swapaxes(1, 2)
    flat = np.random.default_rng(1).normal(size=start.shape)
    vector = unravel(jnp.asarray(flat))
    rest = (hessian, jacobian, outputs, projected, gradients)
    return Truth(objective, case.params, batch, vector, flat, *rest)


def matrices(truth):
    """By operator, the mean matrix of the truth."""
    return {name: (make(truth.objective), getattr(truth, name)) for name, make in OPERATORS.items()}


@pytest.mark.usefixtures("x64")
@cases
@penalty
def test_dense_matrices(model, loss, with_l2):
    """The whole matrices, with and without the penalty."""
    truth = truth_of(model, loss)
    for name, (operator, expected) in matrices(truth).items():
        dense = jax.jit(functools.partial(operator.dense, with_l2=with_l2))
        close(dense(truth.params, truth.batch), expected + with_l2 * truth.penalty, name)


@pytest.mark.usefixtures("x64")
@cases
def test_outputs(model, loss):
    """J of every example in the order of the named leaves, and B with and without projection."""
    truth = truth_of(model, loss)
    close(
        jax.jit(kfgn.gauss_newton(truth.objective).jacobian)(truth.params, truth.batch),
        truth.jacobian,
    )
    gradients = truth.output_gradients
    for make, expected in (
        (kfgn.hessian, truth.outputs),
        (kfgn.gauss_newton, truth.projected),
        (kfgn.empirical_fisher, np.einsum("nk,nl->nkl", gradients, gradients)),
    ):
        close(jax.jit(make(truth.objective).output)(truth.params, truth.batch), expected)
    convex = LOSSES[loss].convex
    assert convex == np.allclose(truth.outputs, truth.projected, atol=1e-12)


@pytest.mark.usefixtures("x64")
@cases
def test_products_in_chunks(model, loss):
    """The matrices times a vector: all at once, one by one, with a remainder, above the count."""
    truth = truth_of(model, loss)

    @jax.jit
    def everything(*args):
        return {
            (name, str(chunk_size)): operator.matvec(*args, with_l2=True, chunk_size=chunk_size)
            for name, (operator, _) in matrices(truth).items()
            for chunk_size in (None, 1, 2, COUNT, 7)
        }

    for (name, chunk_size), found in everything(truth.params, truth.batch, truth.vector).items():
        assert jax.tree.structure(found) == jax.tree.structure(truth.params)
        expected = (matrices(truth)[name][1] + truth.penalty) @ truth.flat
        close(ravel_pytree(found)[0], expected, f"{name} {chunk_size}")


@pytest.mark.usefixtures("x64")
@cases
def test_diagonals_by_parameter(model, loss):
    """The diagonal as a pytree like params."""
    truth = truth_of(model, loss)
    for name, (operator, matrix) in matrices(truth).items():
        found = jax.jit(operator.diagonal_by_parameter)(truth.params, truth.batch)
        assert jax.tree.structure(found) == jax.tree.structure(truth.params)
        close(ravel_pytree(found)[0], np.diag(matrix), name)


@pytest.mark.usefixtures("x64")
def test_defaults_leave_the_penalty_out():
    truth = truth_of("tanh", "one_hot")
    found = kfgn.hessian(truth.objective).matvec(truth.params, truth.batch, truth.vector)
    close(ravel_pytree(found)[0], truth.hessian @ truth.flat)


def wide(count: int) -> tuple[kfgn.Objective, Any, Any]:
    """A network whose activations take far more memory than its parameters and inputs."""

    def model(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    shapes = {"a": (2, 256), "b": (256, 256), "c": (256, 2)}
    params = {name: jnp.full(shape, 0.01) for name, shape in shapes.items()}
    inputs = jnp.ones((count, 2))
    return kfgn.Objective(model, kfgn.losses.half_squared_error), params, (inputs, inputs)


@every_operator
def test_memory_does_not_grow_with_the_batch(make):
    """Sixteen times the examples in chunks of the same size take about the same memory."""

    def temporary(count, chunk_size):
        objective, params, batch = wide(count)
        product = jax.jit(functools.partial(make(objective).matvec, chunk_size=chunk_size))
        compiled = product.lower(params, batch, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(256, 64), temporary(4096, 64)
    assert many < 1.2 * few
    assert temporary(4096, None) > 5 * many


@every_operator
def test_half_precision_parameters(make):
    """Chunks are summed in float32, and the product has the dtype of the parameters."""
    objective, params, batch = wide(6)
    params, (inputs, _) = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, batch))
    arguments = (params, (inputs, inputs), params)
    product = functools.partial(make(objective).matvec, with_l2=True)
    whole, parts = jax.jit(product)(*arguments), product(*arguments, chunk_size=4)
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

    @jax.jit
    def everything(params, batch):
        return (
            kfgn.gauss_newton(objective).rank(params, batch),
            kfgn.gauss_newton(objective).dense(params, batch),
            kfgn.gauss_newton(objective).output(params, batch),
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
    rank = jax.jit(kfgn.gauss_newton(objective).rank)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)
    assert rank(case.params, twice) == rank(case.params, batch)
    assert rank(case.params, batch, tolerance=1.0) == 0
    assert 0 < rank(case.params, batch, tolerance=0.3) < rank(case.params, batch)


@pytest.mark.usefixtures("x64")
@cases
def test_rank_of_the_empirical_fisher_matrix(model, loss):
    """That of the gradients: one for every example; the same examples again add nothing."""
    truth = truth_of(model, loss)
    rank = jax.jit(kfgn.empirical_fisher(truth.objective).rank)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), truth.batch)
    expected = np.linalg.matrix_rank(truth.empirical_fisher, tol=1e-12)
    assert rank(truth.params, truth.batch) == rank(truth.params, twice) == expected == COUNT


def test_rank_is_at_most_the_number_of_parameters():
    """Many examples, few parameters."""
    objective = kfgn.Objective(lambda p, x: x @ p["w"], kfgn.losses.half_squared_error)
    inputs = jax.random.normal(jax.random.key(0), (20, 2))
    rank = kfgn.gauss_newton(objective).rank({"w": jnp.ones((2, 3))}, (inputs, jnp.ones((20, 3))))
    assert rank == 6


# Bad input.


@every_operator
def test_not_an_objective(make):
    with pytest.raises(kfgn.errors.OptionError, match="Objective, found a function"):
        make(lambda p, x: x)


@every_operator
def test_options_are_checked(make):
    objective, params, batch = wide(2)
    operator = make(objective)
    for options in ({"with_l2": 0.1}, {"with_l2": None}):
        for verb, rest in ((operator.matvec, (params,)), (operator.dense, ())):
            with pytest.raises(kfgn.errors.OptionError, match="with_l2 must be True or False"):
                verb(params, batch, *rest, **options)
    for size in (0, -1, 2.0, True, "4"):
        for verb in (
            functools.partial(operator.matvec, v=params),
            operator.diagonal,
            operator.pre_activation,
        ):
            with pytest.raises(kfgn.errors.OptionError, match="chunk_size must be a whole number"):
                verb(params, batch, chunk_size=size)
    with pytest.raises(kfgn.errors.OptionError, match="reduce must be one of None, mean"):
        operator.pre_activation(params, batch, reduce="sum")


@every_operator
def test_vectors_are_checked(make):
    objective, params, batch = wide(2)
    product = make(objective).matvec
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
    for make in OPERATORS.values():
        with pytest.raises(kfgn.errors.OptionError, match=r"90000 x 90000 entries \(30.2 GiB\)"):
            make(objective).dense(params, batch)
    operator = kfgn.gauss_newton(objective)
    for verb in (operator.jacobian, operator.rank):
        with pytest.raises(kfgn.errors.OptionError, match=r"40 x 300 x 90000 entries \(4.0 GiB\)"):
            verb(params, batch)
    one = {"w": jnp.zeros((1, 300))}
    many = (jnp.zeros((6000, 1)), jnp.zeros((6000, 300)))
    with pytest.raises(kfgn.errors.OptionError, match="6000 x 300 x 300 entries"):
        kfgn.hessian(objective).output(one, many)


def test_targets_are_checked_in_chunks():
    """Values outside the loss's domain, also where the batch is a constant of a jit."""
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(lambda p, x: x @ p["w"], loss)
    params, inputs = {"w": jnp.zeros((2, 3))}, jnp.ones((4, 2))
    product = functools.partial(kfgn.hessian(objective).matvec, chunk_size=2)
    for call in (product, lambda *a: jax.jit(lambda v: product(*a[:2], v))(a[2])):
        with pytest.raises(kfgn.errors.LossError, match="class indices"):
            call(params, (inputs, jnp.full(4, 3)), params)
    with pytest.raises(kfgn.errors.BatchError, match="differ in their number"):
        product(params, (inputs, jnp.zeros(3, int)), params)


def test_tolerance_is_checked():
    objective, params, batch = wide(2)
    with pytest.raises(kfgn.errors.OptionError, match="tolerance must be finite and at least 0"):
        kfgn.gauss_newton(objective).rank(params, batch, tolerance=-1.0)
