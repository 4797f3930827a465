"""`inverse="ekfac"`: moments in the eigenbasis and steps beside dense truth in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.base.trees import named_leaves
from kfgn.optimizers.preconditioner import Preconditioner
from tests.tables.row_truth import entries, row_of, setting, submatrices, truth
from tests.tables.small import OBJECTIVE, assert_close, make_batch, make_params, make_step

pytestmark = pytest.mark.usefixtures("x64")

LAMBDA = 0.1
get = optax.tree_utils.tree_get
# Every way to a layer's gradient: one place and several, more of them than outputs, groups, rows
# that are looked up, a kernel seen transposed, one that data chooses, slopes and constants in
# kernels, loops over a stack, a parameter in no layer.
ROWS = (
    "conv_2d_groups conv_1d embed embed_tied_pooled experts masked_and_scaled joined_kernels "
    "scan_layers weight_norm"
)


def bases(factors):
    """Eigenvectors of both factors, by numpy, in their shapes."""
    return {
        n: (None if q.ndim < g.ndim else np.linalg.eigh(q)[1], np.linalg.eigh(g)[1])
        for n, (q, g) in jax.tree.map(np.asarray, factors).items()
    }


def in_basis(basis, block):
    """`diag(U' B U)` of every block of a stack, `[..., i, o]`."""
    left, right = basis
    size = len(block[0]) // right.shape[-1]
    rights = right.reshape(-1, *right.shape[-2:])
    lefts = [np.eye(size)] * len(rights) if left is None else left.reshape(-1, size, size)
    both = [np.kron(u, w) for u, w in zip(lefts, rights, strict=True)]
    assert len(both) == len(block)
    return np.stack([np.diag(u.T @ b @ u) for u, b in zip(both, block, strict=True)])


@functools.cache
def exact_blocks():
    """The Gauss-Newton block and E[gg'] of every layer, by jax.jacobian and jax.hessian."""
    params, (inputs, targets) = make_params(jnp.float64), make_batch(jnp.float64)
    flat, unravel = ravel_pytree(params)
    outputs = OBJECTIVE.model(params, inputs)
    jacobian = jax.jacobian(lambda x: OBJECTIVE.model(unravel(x), inputs))(flat)
    hessian = jax.vmap(jax.hessian(OBJECTIVE.loss))(outputs, targets)
    gradient = jnp.einsum("nk,nkp->np", jax.vmap(jax.grad(OBJECTIVE.loss))(outputs, targets),
                          jacobian)  # fmt: skip
    whole = {
        "kflr": jnp.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian),
        "empirical": gradient.T @ gradient,
    }
    whole["kfra"] = whole["kflr"]
    places = unravel(jnp.arange(len(flat)))
    rows = {
        name: np.concatenate([layer["kernel"], layer["bias"][None]]).astype(int).ravel()
        for name, layer in places.items()
    }
    return {
        method: {n: np.asarray(m[r[:, None], r]) / len(inputs) for n, r in rows.items()}
        for method, m in whole.items()
    }


def step_of(method, **options):
    """One update of `scale_by_kronecker` with each batch's own factors."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
    tx = kfgn.transforms.scale_by_kronecker(blocks, LAMBDA, inverse="ekfac", **options)
    measured = kfgn.value_grad_and_curvature(OBJECTIVE, method, inverse="ekfac")

    @jax.jit
    def update(state, batch):
        (_, grads), curvature = measured(params, batch)
        return grads, *tx.update(grads, state, params, curvature=curvature)

    return tx.init(params), update, batch


@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
def test_step_is_a_dense_solve(method):
    """The exact diagonal in the basis, nearer to the block than Q ⊗ G, and its damped inverse."""
    state, update, batch = step_of(method, decay=None)
    grads, step, state = update(state, batch)
    factors, inverses = state.factors, state.inverses
    for name, block in exact_blocks()[method].items():
        u, scales = np.kron(*inverses[name].basis), np.ravel(inverses[name].scales)
        np.testing.assert_allclose(scales, np.diag(u.T @ block @ u), rtol=0, atol=1e-13)
        nearest = np.linalg.norm(block - (u * scales) @ u.T)
        assert nearest < 0.999 * np.linalg.norm(block - np.kron(*factors[name]))
        g = np.concatenate([grads[name]["kernel"], grads[name]["bias"][None]])
        dense = np.linalg.solve((u * (scales + LAMBDA)) @ u.T, g.ravel()).reshape(g.shape)
        found = np.concatenate([step[name]["kernel"], step[name]["bias"][None]])
        # Roundoff through two eigendecompositions.
        np.testing.assert_allclose(found, dense, rtol=0, atol=1e-11 * np.abs(dense).max())


@pytest.mark.parametrize("name", ROWS.split())
def test_moments_of_rows(name):
    """`diag(U' B U)` of each Gauss-Newton block B, also where kernels are shared."""
    with jax.numpy_dtype_promotion(row_of(name).promotion):
        case, objective, batch, graph = setting(name)
        measured = kfgn.value_grad_and_curvature(objective, "kflr", inverse="ekfac")
        curvature = jax.jit(measured)(case.params, batch)[1]
        found = bases(curvature.factors)
        moments = curvature.basis_moments(found)
        exact = np.mean(truth(name).gauss_newton, axis=0)
    for block, rows in entries(name).items():
        stack = len(found[block][1].reshape(-1, *found[block][1].shape[-2:]))
        dense = submatrices(exact, rows.reshape(stack, -1))
        expected = in_basis(found[block], dense)
        scale = np.abs(expected).max()
        ours = np.reshape(moments[block], expected.shape)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-11 * scale, err_msg=block)
    assert graph.layers


def test_one_example_and_one_sample():
    """KFAC's Kronecker product is then the block itself: moments are products of eigenvalues."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64, count=1)
    measured = kfgn.value_grad_and_curvature(OBJECTIVE, "kfac", inverse="ekfac")
    curvature = jax.jit(measured)(params, batch, key=jax.random.key(1))[1]
    moments = curvature.basis_moments(bases(curvature.factors))
    for name, (q, g) in curvature.factors.items():
        expected = np.outer(np.linalg.eigvalsh(q), np.linalg.eigvalsh(g))
        assert expected.max() > 1e-3
        np.testing.assert_allclose(moments[name][0], expected, rtol=0, atol=1e-13)


def test_average_goes_over_into_a_new_basis():
    """It is the diagonal of the old matrix there, and weighs as factors' averages do."""
    state, update, batch = step_of("kflr", decay=0.5)
    _, _, first = update(state, batch)
    other = make_batch(jnp.float64, seed=1)
    _, _, second = update(first, other)
    params = make_params(jnp.float64)
    measured = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", inverse="ekfac")
    curvature = jax.jit(measured)(params, other)[1]
    new = curvature.basis_moments({n: x.basis for n, x in second.inverses.items()})
    for name, inverse in second.inverses.items():
        old, u = first.inverses[name], np.kron(*inverse.basis)
        v = np.kron(*old.basis)
        carried = np.diag(u.T @ (v * np.ravel(old.scales)) @ v.T @ u).reshape(old.scales.shape)
        assert np.abs(carried - old.scales).max() > 1e-4
        expected = (carried + new[name][0]) / 2
        np.testing.assert_allclose(inverse.scales, expected, rtol=0, atol=1e-13)


def test_sums_and_averages():
    """Moments of a sum of objectives, and of micro-batches, are those of what they make."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    twice = kfgn.sum_of([OBJECTIVE, OBJECTIVE], weights=[1.0, 2.0])
    one = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", inverse="ekfac")
    both = kfgn.value_grad_and_curvature(twice, "kflr", inverse="ekfac")
    halves = [jax.tree.map(lambda x, k=k: x[k::2], batch) for k in range(2)]

    @jax.jit
    def moments(params):
        whole = one(params, batch)[1]
        of = {n: (jnp.linalg.eigh(q)[1], jnp.linalg.eigh(g)[1])
              for n, (q, g) in whole.factors.items()}  # fmt: skip
        mean = kfgn.average_curvature([one(params, half)[1] for half in halves])
        summed = both(params, (batch, batch))[1]
        return tuple(c.basis_moments(of) for c in (whole, mean, summed))

    whole, mean, summed = moments(params)
    assert_close(mean, whole, 1e-12)
    assert_close(summed, jax.tree.map(lambda x: 3 * x, whole), 1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"factor_damping": 1.0}, {"stagger": True, "refresh_inverse_every": 2}],
    ids=["recipe", "search", "stagger"],
)
def test_recipe(options):
    """By `kfgn.make`, which tells both of it; moments are of a batch where it is looked at."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    tx, measured = kfgn.make(OBJECTIVE, params, batch, method="kflr", inverse="ekfac",
                             decay=None, refresh_factors_every=12, **options)  # fmt: skip
    step, state, losses = jax.jit(make_step(tx, "kflr", inverse="ekfac")), tx.init(params), []
    for k in range(12):
        before = params
        params, state, loss = step(params, state, make_batch(jnp.float64, seed=k % 2))
        losses.append(float(loss))
        if k in (1, 9):  # the last look of the first ten
            curvature = measured(before, make_batch(jnp.float64, seed=1))[1]
            seen = {n: x.scales for n, x in get(state, "inverses").items()}
            expected = curvature.basis_moments(
                {n: x.basis for n, x in get(state, "inverses").items()}
            )
            assert_close(seen, {n: expected[n][0] for n in seen}, 1e-10)
    after = {n: np.sum(x.scales) for n, x in get(state, "inverses").items()}
    # Of what is not looked at nothing is added: the trace is the same in any basis.
    assert_close(after, {n: np.sum(x) for n, x in seen.items()}, 1e-10)
    assert losses[-1] < 0.8 * losses[0]


def test_parts_are_masked_and_factors_split():
    """A layer that is masked out has no basis; factors in blocks have one each."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    shapes = {"large_factors": "split", "factor_limit": 3}
    blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch, **shapes)
    tx = kfgn.transforms.scale_by_kronecker(blocks, LAMBDA, inverse="ekfac", decay=None)
    masked = optax.masked(tx, {"hidden": True, "out": False})
    measured = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", inverse="ekfac", **shapes)
    (_, grads), curvature = jax.jit(measured)(params, batch)
    state = masked.init(params)
    _, state = jax.jit(masked.update)(grads, state, params, curvature=curvature)
    ((name, inverse),) = get(state, "inverses").items()
    (left, right), block = inverse.basis, exact_blocks()["kflr"]["hidden"]
    rows = np.arange(block.shape[0]).reshape(5, -1)
    for s, t in np.ndindex(2, 2):
        own = rows[3 * s : 3 * s + 3, 3 * t : 3 * t + 3]
        inside = block[np.ix_(own.ravel(), own.ravel())]
        u = np.kron(left[s, 0][: len(own)], right[0, t])
        expected = np.diag(u.T @ inside @ u).reshape(3, 3)
        np.testing.assert_allclose(inverse.scales[s, t], expected, rtol=0, atol=1e-13)
    assert name == "hidden"


def test_what_is_missing_is_said():
    params, batch = make_params(), make_batch()
    tx = kfgn.kflr(OBJECTIVE, params, batch, inverse="ekfac")
    state = tx.init(params)
    with pytest.raises(kfgn.errors.OptionError, match=r'pass inverse="ekfac" to kfgn\.value_grad'):
        jax.eval_shape(make_step(tx, "kflr"), params, state, batch)
    jax.eval_shape(make_step(tx, "kflr", inverse="ekfac"), params, state, batch)  # the remedy
    mesh = jax.make_mesh((1,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    with pytest.raises(kfgn.errors.OptionError, match='not "ekfac"'):
        kfgn.kflr(OBJECTIVE, params, batch, inverse="ekfac", factor_sharding=sharding)


def test_conjugate_gradients_preconditioned():
    """`Preconditioner.at` has the moments of the curvature that it is given."""
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    blocks = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
    measured = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", inverse="ekfac")

    @jax.jit
    def solved(params):
        _, curvature = measured(params, batch)
        named = curvature.gradient
        return Preconditioner(blocks, "ekfac").at(jnp.asarray(LAMBDA), curvature, named)(named)

    state, update, _ = step_of("kflr", decay=None)
    _, step, _ = update(state, batch)
    assert_close(solved(params), named_leaves(step), 1e-10)
