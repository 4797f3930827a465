"""Which output Hessians are known to be diagonal, and roots of those that are not."""

from __future__ import annotations

import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import kfgn
from kfgn.objective.structure import is_entrywise, semi_definite_root
from tests.tables.comparison import close

SUMS = {
    "power": lambda o, y: jnp.sum((o - y) ** 4),
    "norm": lambda o, y: 0.5 * jnp.vdot(o - y, o - y),
    "optax": lambda o, y: jnp.mean(optax.huber_loss(o, y)),
    "softplus": lambda o, y: jnp.mean(jax.nn.softplus(o) * y**2),
    "pytree": lambda o, y: sum(jax.tree.leaves(jax.tree.map(jnp.sum, [jnp.cosh(o), o**4]))),
    "conditional": lambda o, y: jnp.sum(jnp.where(o > y, (o - y) ** 2, 0.5 * (o - y) ** 2)),
    "jitted": lambda o, y: jax.jit(lambda a: jnp.sum(jnp.exp(a)[None, ..., None]))(o),
    "linear": lambda o, y: jnp.sum(o * y),
    "stretches": lambda o, y: jnp.sum(o[:1] ** 4) + jnp.sum(jnp.cosh(o[1:]) * y[1:]),
    "joined": lambda o, y: jnp.sum(jnp.concatenate([y[:1], o[1:] ** 2, y[:1]]) ** 2),
    "padded": lambda o, y: jnp.sum(jnp.pad(jnp.exp(o), ((2, 1), (0, 0))) * 3),
    "own_weights": lambda o, y: jnp.sum(jax.lax.stop_gradient(jnp.max(o)) * o**2),
}
# Their Hessians have entries off the diagonal, if only a few.
COUPLED = {
    "root_of_sum": lambda o, y: jnp.sqrt(1 + jnp.sum((o - y) ** 2)),
    "logsumexp": lambda o, y: jax.scipy.special.logsumexp(o),
    "neighbors": lambda o, y: jnp.sum((o.ravel()[1:] - o.ravel()[:-1]) ** 2),
    "joined_in_turn": lambda o, y: jnp.sum(jnp.concatenate([o[1:], o[:1]]) * o),
    "columns": lambda o, y: jnp.sum(o[:, 1:] ** 2 * o[:, :-1]),
    "strided": lambda o, y: jnp.sum(o.ravel()[::2] * o.ravel()[:3]),
    "padded_beside": lambda o, y: jnp.sum(jnp.pad(o[:1], ((1, 0), (0, 0))) * o),
    "one_for_all": lambda o, y: jnp.sum(o.ravel()[0] * o),
    "reversed": lambda o, y: jnp.sum(o * o.ravel()[::-1].reshape(o.shape)),
    "transposed": lambda o, y: jnp.sum(o * o.T.reshape(o.shape)),
    "rolled_once": lambda o, y: jnp.sum(o**2) + o.ravel()[0] * o.ravel()[-1],
    "rows": lambda o, y: jnp.sum(jnp.sum(o, axis=-1) ** 2),
    "row_beside_column": lambda o, y: jnp.sum(jnp.sin(o[:, None] + o[None, :])),
}


def batch(shape):
    return (jax.random.normal(jax.random.key(i), (4, *shape)) for i in range(2))


def found_of(loss, outputs, targets):
    """The Hessian and all Gauss-Newton quantities of a batch."""

    def run(outputs, targets):
        count, column = loss.sqrt_columns(outputs, targets)
        vector = jnp.linspace(-1, 1, outputs[0].size)
        return {
            "hessian": jax.vmap(loss.hessian)(outputs, targets),
            "gauss_newton": jax.vmap(loss.gauss_newton_hessian)(outputs, targets),
            "root": jax.vmap(loss.hessian_sqrt)(outputs, targets),
            "columns": jnp.stack([column(jnp.asarray(k)) for k in range(count)], axis=-1),
            "mean": loss.mean_hessian(outputs, targets),
            "product": jax.vmap(lambda o, t: loss.gauss_newton_product(o, t, vector))(
                outputs, targets
            ),
        }

    compiled = jax.jit(run).lower(outputs, targets).compile()
    return jax.tree.map(np.asarray, compiled(outputs, targets)), compiled.as_text()


def decomposes(program):
    """Whether a program has a decomposition of matrices."""
    return bool(re.search("lapack|cholesky|syev", program, re.IGNORECASE))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("name", SUMS)
def test_sums_have_diagonal_hessians(name, convex):
    """They are found out, exact, and nothing is decomposed, whether or not told to be convex."""
    loss = kfgn.losses.from_function(SUMS[name], convex=convex)
    outputs, targets = batch((2, 3))
    assert loss.second_derivatives(outputs[0], targets[0]) is not None
    found, program = found_of(loss, outputs, targets)
    assert not decomposes(program)
    truth = np.asarray(jax.jit(jax.vmap(jax.hessian(SUMS[name])))(outputs, targets))
    truth = truth.reshape(4, 6, 6)
    convex_part = np.maximum(truth, 0)  # of a diagonal matrix
    close(found["hessian"], truth, "Hessian")
    close(found["gauss_newton"], convex_part, "Gauss-Newton")
    for root in ("root", "columns"):
        close(found[root] @ np.swapaxes(found[root], 1, 2), convex_part, root)
    close(found["product"], convex_part @ np.linspace(-1, 1, 6), "product")
    close(found["mean"], np.mean(found["gauss_newton"], axis=0), "mean")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_outputs_are_not_taken_for_sums(name):
    loss = kfgn.losses.from_function(COUPLED[name])
    shape = (3,) if name == "row_beside_column" else (2, 3)
    outputs, targets = batch(shape)
    assert loss.second_derivatives(outputs[0], targets[0]) is None
    truth = jax.jit(jax.vmap(jax.hessian(COUPLED[name])))(outputs, targets)
    size = outputs[0].size
    hessians = jax.jit(jax.vmap(loss.hessian))(outputs, targets)
    close(hessians, np.asarray(truth).reshape(4, size, size), "Hessian")


def test_what_is_filled_in_counts():
    x = jnp.arange(4.0)
    assert is_entrywise(lambda v: lax.pad(v[1:], np.float32(0), [(1, 0, 0)]), x)
    assert not is_entrywise(lambda v: lax.pad(v[1:], v[2], [(1, 0, 0)]), x)


def bound(outputs, image):
    """Of a variational autoencoder: sums over each of three outputs."""
    logits, mean, s = outputs["logits"], outputs["mean"], outputs["log_variance"]
    fit = jnp.sum(jax.nn.softplus(logits) - logits * image)
    return fit + 0.5 * jnp.sum(mean**2 + jnp.exp(s) - s - 1)


def gaussian(outputs, target):
    """Mean and variance are coupled."""
    mean, s = outputs["mean"], outputs["log_variance"]
    return 0.5 * jnp.sum((target - mean) ** 2 * jnp.exp(-s) + s)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(("function", "diagonal"), [(bound, True), (gaussian, False)])
def test_several_outputs(function, diagonal, scalar):
    shapes = {"logits": (3, 2), "mean": (4,), "log_variance": (4,)}
    shapes = {name: () if scalar and name != "logits" else shape for name, shape in shapes.items()}
    outputs = {name: jax.random.normal(jax.random.key(len(name)), s) for name, s in shapes.items()}
    target = jnp.ones(shapes["logits" if diagonal else "mean"])
    loss = kfgn.losses.from_function(function)
    flat, restore = jax.flatten_util.ravel_pytree(outputs)
    truth = jax.hessian(lambda x: function(restore(x), target))(flat)
    found = loss.second_derivatives(outputs, target)
    assert (found is not None) == diagonal
    close(jnp.diag(found) if diagonal else loss.hessian(outputs, target), truth)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["root_of_sum", "logsumexp", "neighbors", "rows"])
def test_convex_losses_decompose_nothing(name):
    """Roots by Cholesky's method, also of singular Hessians, and products by differentiation."""
    loss = kfgn.losses.from_function(COUPLED[name], convex=True)
    outputs, targets = batch((2, 3))
    found, program = found_of(loss, outputs, targets)
    assert not decomposes(program)
    truth = np.asarray(jax.jit(jax.vmap(jax.hessian(COUPLED[name])))(outputs, targets))
    truth = truth.reshape(4, 6, 6)
    for root in ("root", "columns"):
        close(found[root] @ np.swapaxes(found[root], 1, 2), truth, root)
    close(found["gauss_newton"], truth, "Gauss-Newton")
    close(found["mean"], np.mean(truth, axis=0), "mean")
    close(found["product"], truth @ np.linspace(-1, 1, 6), "product")
    _, program = found_of(kfgn.losses.from_function(COUPLED[name]), outputs, targets)
    assert decomposes(program)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 2, 7, 30])
@pytest.mark.parametrize("rank", [0, 1, 3, 30])
def test_roots_of_singular_matrices(size, rank):
    """To roundoff of the largest entry, whatever the rank and the scales of the rows."""
    rng = np.random.default_rng(size + 100 * rank)
    factor = rng.normal(size=(3, size, rank)) * 10.0 ** rng.integers(-6, 6, (size, 1))
    matrices = factor @ np.swapaxes(factor, 1, 2)
    roots = np.asarray(jax.jit(jax.vmap(semi_definite_root))(jnp.asarray(matrices)))
    error = np.max(np.abs(roots @ np.swapaxes(roots, 1, 2) - matrices), axis=(1, 2))
    # The stopping rule leaves size * eps of the largest diagonal entry, rounding as much again.
    scale = np.max(np.abs(matrices), axis=(1, 2))
    assert np.all(error <= 4 * size * np.finfo(float).eps * scale)
    columns = np.sum(np.any(roots != 0, axis=1), axis=1)
    assert np.all(columns <= min(rank, size))


def test_roots_of_what_is_not_finite():
    """NaN stays NaN, so that an update sees it."""
    matrix = jnp.eye(3).at[1, 1].set(jnp.nan)
    assert np.any(np.isnan(semi_definite_root(matrix)))


@pytest.mark.usefixtures("x64")
def test_gaussian_with_learned_variance():
    """Value and Hessian by definition; Gauss-Newton is Fisher's matrix, which samples have, too."""
    loss = kfgn.losses.gaussian_negative_log_likelihood
    keys = jax.random.split(jax.random.key(0), 3)
    mean, log_variance, targets = (jax.random.normal(k, (4, 3)) for k in keys)

    def density(flat, target):
        error, variance = target - flat[:3], jnp.exp(flat[3:])
        return -jnp.sum(jnp.log(jnp.exp(-(error**2) / (2 * variance)) / jnp.sqrt(variance)))

    flat = jnp.concatenate([mean, log_variance], axis=1)
    outputs = (mean, log_variance)
    close(jax.vmap(loss)(outputs, targets), jax.vmap(density)(flat, targets), "value")
    close(loss.gradients(outputs, targets), jax.vmap(jax.grad(density))(flat, targets), "gradient")
    hessians = jax.jit(jax.vmap(loss.hessian))(outputs, targets)
    close(hessians, jax.jit(jax.vmap(jax.hessian(density)))(flat, targets), "Hessian")

    # The mean of the Hessian over the three points of Gauss-Hermite quadrature is exact.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    of = jax.jit(jax.vmap(jax.hessian(density)))
    spread = jnp.exp(0.5 * log_variance)
    fisher = sum(
        w / np.sum(weights) * np.asarray(of(flat, mean + x * spread))
        for x, w in zip(nodes, weights, strict=True)
    )
    close(jax.jit(jax.vmap(loss.gauss_newton_hessian))(outputs, targets), fisher, "Fisher")
    roots = np.asarray(jax.jit(jax.vmap(loss.hessian_sqrt))(outputs, targets))
    close(roots @ np.swapaxes(roots, 1, 2), fisher, "root")
    close(loss.mean_hessian(outputs, targets), np.mean(fisher, axis=0), "mean")

    samples = 40_000
    many = jax.tree.map(lambda x: jnp.repeat(x[:1], samples, axis=0), outputs)
    gradients = np.asarray(jax.jit(loss.sampled_gradients)(jax.random.key(1), many, targets[:1]))
    outer = gradients[:, :, None] * gradients[:, None, :]
    error = np.std(outer, axis=0) / samples**0.5
    assert np.all(np.abs(np.mean(outer, axis=0) - fisher[0]) <= 5 * error)

    with pytest.raises(kfgn.errors.LossError, match="a pair of arrays"):
        kfgn.Objective(lambda p, x: x, loss)({}, (mean, targets))


losses, OptionError, LossError = kfgn.losses, kfgn.errors.OptionError, kfgn.errors.LossError
OUTPUTS = jnp.zeros((4, 3))
BAD = {
    "delta": (lambda: losses.huber(0), OptionError, "positive number, found 0"),
    "width": (lambda: losses.quantile(0.5, -1), OptionError, "width must be a positive number"),
    "level": (lambda: losses.quantile([0.5, 1.5]), OptionError, "level must be between 0 and 1"),
    "levels": (
        lambda: of(losses.quantile([0.5, 0.9]), OUTPUTS), LossError, "each of the 2 levels"
    ),
    "what is masked": (
        lambda: losses.masked(losses.softmax_cross_entropy), LossError, "have ignore_index"
    ),
    "no mask": (
        lambda: of(losses.masked(losses.huber()), OUTPUTS), LossError, r"expected targets \(y, mask"
    ),
    "masked counts": (
        lambda: of(losses.masked(losses.poisson_negative_log_likelihood),
                   (OUTPUTS - 1, OUTPUTS.at[1].set(1))), LossError, "must not be negative, found -1"
    ),
}  # fmt: skip


def of(loss, targets):
    return kfgn.Objective(lambda p, x: x + p, loss)(jnp.zeros(()), (OUTPUTS, targets))


@pytest.mark.parametrize("name", BAD)
def test_wrong_losses(name):
    make, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        make()


def test_what_is_masked_counts_for_nothing():
    """Not even where negative or NaN, also in a mask of numbers."""
    loss = losses.masked(losses.poisson_negative_log_likelihood)
    targets = jnp.full((4, 3), -1.0).at[1].set(jnp.nan), jnp.zeros((4, 3))
    assert float(of(loss, targets)) == 0
    objective = kfgn.Objective(lambda p, x: x + p, loss)
    assert kfgn.layers.find_blocks(objective, jnp.zeros(3), (OUTPUTS, targets)).layers
