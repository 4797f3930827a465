"""Every loss against its definition: derivatives, square roots, sampling, extremes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables import losses as table
from tests.tables.comparison import close

COUNT = 5
LOSSES = table.LOSSES | table.MORE_LOSSES

# The shape of one example's outputs, the last axis being the classes.
SHAPES = {name: [(3,)] for name in LOSSES}
for name in ("squared_error", "sigmoid", "pseudo_huber", "poisson", "huber", "masked"):
    SHAPES[name] += [(), (2, 3)]
SHAPES["quantile"] += [(2, 3)]
SOFTMAX = ("one_hot", "soft_labels", "integer_labels", "ignoring", "smoothed", "weighted")
for name in (*SOFTMAX, "all_options"):
    SHAPES[name] += [(2, 3)]
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
every_case = pytest.mark.parametrize(
    ("name", "shape"), CASES, ids=[f"{name}-{'x'.join(map(str, s))}" for name, s in CASES]
)


def make_batch(name, shape, dtype=jnp.float64, count=COUNT):
    """Outputs and targets of a few examples."""
    key, target_key = jax.random.split(jax.random.key(1))
    outputs = 2 * jax.random.normal(key, (count, *shape), dtype)
    if name == "gaussian":
        outputs = {"mean": outputs, "log_scale": 0.3 * outputs[::-1]}
    return outputs, LOSSES[name].targets(target_key, outputs)


def flat_reference(name, outputs, target):
    """The reference as a function of the flat outputs of one example, and those."""
    flat, unravel = ravel_pytree(outputs)
    return lambda o: LOSSES[name].reference(unravel(o), target), flat


def semi_definite(matrices):
    """Symmetric matrices with their negative eigenvalues set to zero."""
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * np.maximum(values, 0)[:, None]) @ np.swapaxes(vectors, 1, 2)


@pytest.mark.usefixtures("x64")
@every_case
def test_derivatives_and_roots(name, shape):
    """Value, gradient, Hessian, its square root, products and mean, by differentiation."""
    row, loss = LOSSES[name], LOSSES[name].loss
    outputs, targets = make_batch(name, shape)
    size = ravel_pytree(outputs)[0].size // COUNT
    vector = jnp.linspace(-1, 1, size)

    def truth(output, target):
        function, flat = flat_reference(name, output, target)
        return function(flat), jax.grad(function)(flat), jax.hessian(function)(flat)

    def per_example(output, target):
        return {
            "value": loss(output, target),
            "hessian": loss.hessian(output, target),
            "gauss_newton": loss.gauss_newton_hessian(output, target),
            "root": loss.hessian_sqrt(output, target),
            "product": loss.gauss_newton_product(output, target, vector),
        }

    @jax.jit
    def everything(outputs, targets):
        count, column = loss.sqrt_columns(outputs, targets)
        columns = jnp.stack([column(jnp.asarray(k)) for k in range(count)], axis=-1)
        whole = {
            "columns": columns,
            "mean": loss.mean_hessian(outputs, targets),
            "gradients": loss.gradients(outputs, targets),
        }
        one = jax.vmap(per_example)(outputs, targets)
        return jax.vmap(truth)(outputs, targets), one, whole

    expected, one, whole = everything(outputs, targets)
    value, gradient, hessian = (np.asarray(x) for x in expected)
    convex = hessian if row.convex else semi_definite(hessian)
    close(one["value"], value, "value")
    close(whole["gradients"], gradient, "gradients")
    close(one["hessian"], hessian, "Hessian")
    close(one["gauss_newton"], convex, "Gauss-Newton Hessian")
    for found in ("root",), ("columns",):
        c = np.asarray({**one, **whole}[found[0]])
        assert c.shape[:2] == (COUNT, size)
        close(c @ np.swapaxes(c, 1, 2), convex, found[0])
    close(one["product"], convex @ np.asarray(vector), "product")
    close(whole["mean"], np.mean(convex, axis=0), "mean")


@pytest.mark.usefixtures("x64")
def test_projection_is_needed():
    """The losses called not convex have negative curvature somewhere in these tests."""
    for name in ("mixture", "gaussian"):
        loss = LOSSES[name].loss
        batch = make_batch(name, (3,))
        hessians = jax.jit(jax.vmap(loss.hessian))(*batch)
        assert np.min(np.linalg.eigvalsh(np.asarray(hessians))) < -1e-2
        projected = jax.jit(jax.vmap(loss.gauss_newton_hessian))(*batch)
        spectra = np.linalg.eigvalsh(np.asarray(projected))
        assert np.min(spectra) > -1e-14 * np.max(spectra)


LIKELIHOODS = [
    ("squared_error", (3,)),
    ("squared_error", (2, 2)),
    ("sigmoid", (3,)),
    ("one_hot", (3,)),
    ("one_hot", (2, 3)),
    ("integer_labels", (3,)),
    ("integer_labels", (2, 3)),
    ("poisson", (2, 2)),
    ("masked", (2, 2)),
]
LIKELIHOODS += [(name, (2, 3)) for name in ("ignoring", "smoothed", "weighted", "all_options")]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "shape"), LIKELIHOODS)
def test_sampled_gradients(name, shape):
    """At targets drawn from the model, gradients have mean 0 and the Hessian as covariance."""
    samples, loss = 20_000, LOSSES[name].loss
    outputs, targets = make_batch(name, shape, count=1)

    @jax.jit
    def run(batch):
        repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), batch)
        first = jax.tree.map(lambda a: a[0], batch)
        return loss.sampled_gradients(jax.random.key(4), *repeated), loss.hessian(*first)

    gradients, hessian = map(np.asarray, run((outputs, targets)))
    assert gradients.shape == (samples, outputs.size)
    outer = gradients[:, :, None] * gradients[:, None, :]
    # Five standard errors, as estimated from the sample, for some 60 entries in
    # all. An entry that is constant has none, so roundoff is allowed for.
    error = np.std(gradients, axis=0) / samples**0.5
    assert np.all(np.abs(np.mean(gradients, axis=0)) <= 5 * error + 1e-12)
    error = np.std(outer, axis=0) / samples**0.5
    assert np.all(np.abs(np.mean(outer, axis=0) - hessian) <= 5 * error + 1e-12)


@pytest.mark.usefixtures("x64")
def test_own_sampling():
    """A loss from a function samples as it is told: the mixture's gradients have mean 0."""
    loss = LOSSES["mixture"].loss
    outputs = jnp.repeat(jnp.asarray([[0.4, 1.5, -0.8]]), 20_000, axis=0)
    gradients = np.asarray(jax.jit(loss.sampled_gradients)(jax.random.key(2), outputs, None))
    error = np.std(gradients, axis=0) / 20_000**0.5
    assert np.all(np.abs(np.mean(gradients, axis=0)) <= 5 * error)


@pytest.mark.parametrize("name", ["pseudo_huber", "coupled"])
def test_without_sampling(name):
    """A loss that was given no way to sample says so, and has its root times signs instead."""
    loss, (outputs, targets) = LOSSES[name].loss, make_batch(name, (3,), jnp.float32)
    with pytest.raises(kfgn.errors.LossError, match="sample="):
        loss.sample(jax.random.key(0), outputs[0])
    found = np.asarray(loss.sampled_gradients(jax.random.key(0), outputs, targets))
    roots = np.asarray(jax.vmap(loss.hessian_sqrt)(outputs, targets))
    signs = np.stack([np.linalg.solve(root, row) for root, row in zip(roots, found, strict=True)])
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-4)  # float32, a condition of about 10
    assert len(np.unique(np.sign(signs), axis=0)) > 1


@pytest.mark.parametrize("name", ["sigmoid", "one_hot", "integer_labels", "all_options", "mixture"])
def test_extreme_logits(name):
    """Logits of ±200, where exp overflows float32: finite, and semi-definite."""
    loss = LOSSES[name].loss
    outputs = jnp.asarray([[200.0, -200, 0], [-200, 200, 200], [-200, -200, -200]], jnp.float32)
    targets = LOSSES[name].targets(jax.random.key(0), outputs)

    @jax.jit
    def everything(outputs, targets):
        count, column = loss.sqrt_columns(outputs, targets)
        return {
            "value": jax.vmap(loss)(outputs, targets),
            "gradients": loss.gradients(outputs, targets),
            "hessian": jax.vmap(loss.hessian)(outputs, targets),
            "gauss_newton": jax.vmap(loss.gauss_newton_hessian)(outputs, targets),
            "root": jax.vmap(loss.hessian_sqrt)(outputs, targets),
            "mean": loss.mean_hessian(outputs, targets),
            "columns": [column(jnp.asarray(k)) for k in range(count)],
            "product": jax.vmap(loss.gauss_newton_product)(outputs, targets, outputs),
            "sampled": loss.sampled_gradients(jax.random.key(1), outputs, targets),
        }

    found = everything(outputs, targets)
    for what, leaves in found.items():
        for leaf in jax.tree.leaves(leaves):
            assert leaf.dtype == jnp.float32, what
            assert np.all(np.isfinite(leaf)), what
    spectrum = np.linalg.eigvalsh(np.asarray(found["mean"]))
    assert spectrum[0] >= -1e-6 * max(spectrum[-1], 1e-6)


@pytest.mark.usefixtures("x64")
def test_small_variances_do_not_cancel():
    """At a logit of 40, `p (1 - p)` would be 0 in float64; the variance is e^-40."""
    loss = LOSSES["sigmoid"].loss
    outputs = jnp.asarray([40.0, -40.0])
    variance = np.diag(np.asarray(loss.hessian(outputs, jnp.ones(2))))
    np.testing.assert_allclose(variance, np.exp(-40.0), rtol=1e-12)


def test_plain_functions_become_losses():
    """An objective takes a bare function of one example; its name is in the loss's."""

    def my_loss(outputs, target):
        return jnp.sum((outputs - target) ** 2)

    objective = kfgn.Objective(lambda p, x: x @ p["w"], my_loss)
    assert "my_loss" in repr(objective.loss)
    assert not objective.loss.convex
