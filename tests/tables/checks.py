"""The tests of a row of the second table beside dense truth: blocks, factors, methods.

They run in one module for each part of the table, so that the parts run side
by side; `rows_of` says which rows a module has. Truth comes from `jax.hessian`
and `jax.jacobian` with respect to the parameters themselves; kfgn tells only
the order in which a block lists their entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.base.trees import named_leaves, with_leaves
from tests.tables.dense import quick_jit
from tests.tables.second_table import LOSSES, ROWS, Case, Row

__all__ = [
    "promotion",
    "pytestmark",
    "test_blocks",
    "test_gradient",
    "test_hessian_diagonal",
    "test_kflr_is_exact",
    "test_kfra_is_kflr_for_one_example",
    "test_kronecker_of_one_example_in_one_place",
    "test_layers",
    "test_parameters_round_trip",
    "test_unassigned_diagonal",
]

pytestmark = pytest.mark.usefixtures("x64", "promotion")


def rows_of(table: dict[str, Row]) -> Callable[[pytest.Metafunc], None]:
    """A module's `pytest_generate_tests`: every test gets every row that it is exact for."""

    def generate(metafunc: pytest.Metafunc) -> None:
        rounded = metafunc.function in (test_layers, test_parameters_round_trip)
        rows = [name for name, row in table.items() if rounded or "bf16" not in row.tags]
        metafunc.parametrize("name", rows)

    return generate


def with_loss(rows: Iterable[str], loss: str) -> dict[str, Row]:
    """Rows under another loss than their own, by names that say so."""
    return {f"{name} with {loss}": ROWS[name] for name in rows if ROWS[name].loss != loss}


def row_of(name: str) -> Row:
    """The row, under its own loss or another."""
    return ROWS[name.partition(" with ")[0]]


@pytest.fixture
def promotion(request: pytest.FixtureRequest, strict_dtypes: None) -> Iterator[None]:
    """Strict dtypes, except for the rows that say they cannot have them."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    with jax.numpy_dtype_promotion(row_of(name).promotion if name else "strict"):
        yield


class Compared(NamedTuple):
    case: Case
    tolerance: float
    blocks: kfgn.layers.LayerBlocks
    ours: dict[str, Any]
    hessian: np.ndarray  # of the mean loss, `[P, P]`
    gauss_newton: np.ndarray  # `[N, P, P]`
    gradient: np.ndarray
    names: dict[str, np.ndarray]  # places of each parameter's entries in the flat vector


@functools.cache
def compare(name: str) -> Compared:
    case = row_of(name).case()
    row = LOSSES[name.partition(" with ")[2] or row_of(name).loss]
    outputs = jax.eval_shape(case.model, case.params, case.inputs)
    targets = row.targets(jax.random.key(7), outputs)
    objective = kfgn.Objective(case.model, row.loss)
    batch = (case.inputs, targets)
    blocks = kfgn.layers.find_blocks(objective, case.params, batch, unassigned="gradient")
    ours = quick_jit(functools.partial(_ours, objective))(case.params, batch)
    flat, unravel = ravel_pytree(case.params)
    places = named_leaves(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    truth = quick_jit(functools.partial(_truth, case.model, row, unravel))
    hessian, gauss_newton, gradient = truth(flat, batch)
    return Compared(
        case,
        row_of(name).tolerance,
        blocks,
        jax.tree.map(np.asarray, ours),
        np.asarray(hessian),
        np.asarray(gauss_newton),
        np.asarray(gradient),
        {n: np.asarray(x).astype(int) for n, x in places.items()},
    )


def _ours(objective, params, batch):
    first = jax.tree.map(lambda a: a[:1], batch)

    def factors(method, batch, **options):
        options["unassigned"] = "diagonal"
        function = kfgn.value_grad_and_curvature(objective, method, **options)
        (_, gradient), curvature = function(params, batch)
        return gradient, curvature.factors

    gradient, kflr = factors("kflr", batch)
    return {
        "gradient": ravel_pytree(gradient)[0],
        "block_hessian": kfgn.hessian(objective).blocks(params, batch),
        "block_gauss_newton": kfgn.gauss_newton(objective).blocks(params, batch),
        "hessian_diagonal": kfgn.hessian(objective).diagonal(params, batch),
        "pre_activation": kfgn.gauss_newton(objective).pre_activation(params, batch),
        "kflr": kflr,
        "kflr_reduce": factors("kflr", batch, sharing="reduce")[1],
        "kfra_first": factors("kfra", first)[1],
        "kflr_first": factors("kflr", first)[1],
    }


def _truth(model, row, unravel, flat, batch):
    inputs, targets = batch

    def outputs(flat, x):
        out = model(unravel(flat), jax.tree.map(lambda a: a[None], x))
        return jax.tree.map(lambda a: a[0], out)

    def losses(flat):
        return jnp.mean(jax.vmap(lambda x, t: row.reference(outputs(flat, x), t))(inputs, targets))

    def gauss_newton(x, t):
        out, restore = ravel_pytree(outputs(flat, x))
        jacobian = jax.jacobian(lambda p: ravel_pytree(outputs(p, x))[0])(flat)
        curved = jax.hessian(lambda o: row.reference(restore(o), t))(out)
        return jacobian.T @ curved @ jacobian

    of_examples = jax.vmap(gauss_newton)(inputs, targets)
    return jax.hessian(losses)(flat), of_examples, jax.grad(losses)(flat)


def order(compared: Compared, block: str) -> np.ndarray:
    """Places of a block's entries among all parameters, `[S, n]` with slots."""
    if block not in compared.blocks.layers:
        return compared.names[block].reshape(1, -1)
    layer = compared.blocks.layers[block]
    own = {n: jnp.asarray(compared.names[n], float) for n in layer.parameters}
    found = np.asarray(layer.to_matrix(own)).astype(int)
    return found.reshape(len(layer.slots), -1)


def dense_blocks(compared: Compared, block: str, matrix: np.ndarray) -> np.ndarray:
    """The truth's blocks, `[..., n, n]`, with a leading axis of slots."""
    rows = order(compared, block)
    return np.stack([matrix[..., r[:, None], r[None, :]] for r in rows])


def close(compared, found, expected):
    """Up to roundoff of a few hundred operations, relative to the largest entry."""
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * compared.tolerance * scale)


def test_layers(name):
    """Every parameter is in the block it should be in, under its name."""
    compared, row = compare(name), row_of(name)
    found = {n: layer.parameters for n, layer in compared.blocks.layers.items()}
    assert found == row.expected
    assert set(compared.blocks.unassigned) == set(row.unassigned)


def test_gradient(name):
    compared = compare(name)
    close(compared, compared.ours["gradient"], compared.gradient)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_blocks(name, kind):
    """Exact for every parameter, in a layer or not, with all cross terms of tied ones."""
    compared = compare(name)
    whole = compared.hessian if kind == "hessian" else compared.gauss_newton.mean(axis=0)
    found = compared.ours[f"block_{kind}"]
    assert set(found) == {*compared.blocks.layers, *compared.blocks.unassigned}
    for block, ours in found.items():
        truth = dense_blocks(compared, block, whole)
        close(compared, ours.reshape(truth.shape), truth)


def test_hessian_diagonal(name):
    compared = compare(name)
    for block, ours in compared.ours["hessian_diagonal"].items():
        places = order(compared, block)
        close(compared, ours.reshape(places.shape), np.diag(compared.hessian)[places])


def test_unassigned_diagonal(name):
    """The exact diagonal of the Gauss-Newton matrix."""
    compared = compare(name)
    for parameter in compared.blocks.unassigned:
        places = compared.names[parameter]
        truth = np.diag(compared.gauss_newton.mean(axis=0))[places]
        close(compared, compared.ours["kflr"][parameter].diagonal, truth)


def test_kfra_is_kflr_for_one_example(name):
    """The recursion's expectations are then no approximations."""
    compared = compare(name)
    jax.tree.map(
        lambda a, b: close(compared, a, b),
        compared.ours["kfra_first"],
        compared.ours["kflr_first"],
    )


def test_kflr_is_exact(name):
    """G is the mean of the exact matrices at the pre-activations, summed over places."""
    compared = compare(name)
    for block, layer in compared.blocks.layers.items():
        if layer.flipped or len(layer.uses) > 1 or layer.stack > 1:
            continue
        (use,) = layer.uses.values()
        matrix = compared.ours["pre_activation"][block].mean(axis=0)
        places = use.pre_activations(np.arange(len(matrix)).reshape(use.output.aval.shape))[0]
        expand = sum(matrix[p[:, None], p[None, :]] for p in places) / len(places)
        reduce = sum(matrix[p[:, None], q[None, :]] for p in places for q in places)
        single = layer.indexed and layer.activation_size == 1
        close(compared, compared.ours["kflr"][block].pre_activation, reduce if single else expand)
        if not layer.indexed:
            close(compared, compared.ours["kflr_reduce"][block].pre_activation, reduce)


def kronecker(layer, factors: kfgn.layers.Factors) -> np.ndarray:
    """`Q ⊗ G` of every slot, `[slots, n, n]`, groups on the diagonal."""
    q, g = factors
    q = q.reshape(layer.stack, *layer.activation_shape[-1 if layer.indexed else -2 :])
    g = g.reshape(layer.stack, layer.d_out, layer.d_out)
    groups, slots = layer.first.form.groups, []
    for slot in range(len(layer.slots)):
        own = range(slot * groups, (slot + 1) * groups)
        parts = [np.kron(np.diag(q[k]) if layer.indexed else q[k], g[k]) for k in own]
        size = len(parts[0])
        whole = np.zeros((groups * size,) * 2)
        for k, part in enumerate(parts):
            whole[k * size : (k + 1) * size, k * size : (k + 1) * size] = part
        slots.append(whole)
    return np.stack(slots)


def test_kronecker_of_one_example_in_one_place(name):
    """`Q ⊗ G` is the block itself where a kernel is used once per example, N = 1."""
    compared = compare(name)
    for block, layer in compared.blocks.layers.items():
        once = all(layer.positions(k) == 1 for k in range(len(layer.slots)))
        if not once or layer.first.form.groups > 1:
            continue
        truth = dense_blocks(compared, block, compared.gauss_newton[0])
        close(compared, kronecker(layer, compared.ours["kflr_first"][block]), truth)


def test_parameters_round_trip(name):
    """`from_matrix` undoes `to_matrix`."""
    compared = compare(name)
    leaves = named_leaves(compared.case.params)
    for layer in compared.blocks.layers.values():
        back = layer.from_matrix(layer.to_matrix(leaves))
        assert set(back) == set(layer.parameters)
        for parameter, value in back.items():
            assert value.dtype == leaves[parameter].dtype
            whole = np.asarray(value) == np.asarray(leaves[parameter])
            assert np.all(whole | (np.asarray(value) == 0))
    assert jax.tree.structure(with_leaves(compared.case.params, leaves)) == jax.tree.structure(
        compared.case.params
    )
