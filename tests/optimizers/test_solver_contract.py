"""Hessian-free optimization and Newton's method keep the contract of test_optax_contract, too."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables.contract import (
    Case,
    Record,
    by_layer,
    check_jit_equals_no_jit,
    check_loss_falls,
    check_state_is_named_tuples_of_arrays,
    check_structure_is_stable,
    descend,
    measure,
    parametrize,
    train,
)
from tests.tables.small import (
    CLASSES,
    HIDDEN,
    INPUTS,
    L2,
    LOSS,
    OBJECTIVE,
    assert_close,
    assert_equal,
    make_batch,
    make_params,
    shapes,
)

UPDATES = 8
DAMPING = 0.1


def free(preconditioner: str | None = None, **options: Any) -> Any:
    """Hessian-free optimization."""
    if preconditioner == "kronecker":
        blocks = kfgn.layers.find_blocks(OBJECTIVE, shapes(make_params()), shapes(make_batch()))
        options = {"blocks": blocks, **options}
    options = {"damping": DAMPING, "preconditioner": preconditioner, **options}
    return kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, **options)


def newton(structure: str = "full", **options: Any) -> Any:
    return kfgn.transforms.scale_by_newton(
        OBJECTIVE, structure=structure, **{"damping": DAMPING, **options}
    )


def vector(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def halves(tx: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(tx, optax.scale(-0.5))


def with_batch(params: Any, batch: Any, curvature: Any) -> dict[str, Any]:
    return {"curvature": curvature, "batch": batch}


def with_params(params: Any, batch: Any, curvature: Any) -> dict[str, Any]:
    """What is needed where some of params are masked out."""
    return {"curvature": curvature, "batch": batch, "all_params": params}


def only_batch(params: Any, batch: Any, curvature: Any) -> dict[str, Any]:
    return {"batch": batch}


SOLVERS = {
    "conjugate gradients": free,
    "diagonal": lambda: free("diagonal"),
    "gauss_newton_diagonal": lambda: free("gauss_newton_diagonal"),
    "kronecker": lambda: free("kronecker"),
    "newton": newton,
    "newton block": lambda: newton("block"),
}

first_layer = by_layer(hidden=True, out=False)
second_layer = by_layer(hidden=False, out=True)
inject = functools.partial(
    optax.inject_hyperparams(
        kfgn.transforms.scale_by_conjugate_gradient, static_args=("objective", "max_iterations")
    ),
    OBJECTIVE,
)
inject_newton = optax.inject_hyperparams(kfgn.solvers.newton, static_args="objective")
adapting = kfgn.transforms.LevenbergMarquardt(1.0, 1e-6, 1e6, period=1, decay=2 / 3)


def parts(second: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.partition(
        {"second": halves(second), "first": optax.adam(0.02)},
        by_layer(hidden="second", out="first"),
    )


def case(make: Any, keywords: Any = with_batch, **options: Any) -> Case:
    return Case(make, "kflr", keywords=keywords, **options)


CASES = {name: case(functools.partial(lambda f: halves(f()), f)) for name, f in SOLVERS.items()} | {
    "adaptive, warm": case(
        lambda: optax.chain(free("kronecker", damping=adapting, warm_start=0.9), descend())
    ),
    "eigen": case(lambda: halves(free("kronecker", inverse="eigen"))),
    "clip": case(lambda: optax.chain(optax.clip_by_global_norm(0.1), free(), descend())),
    "weight decay": case(
        lambda: optax.chain(free(), optax.add_decayed_weights(1e-2), optax.scale(-0.5))
    ),
    "masked": case(lambda: halves(optax.masked(free("kronecker"), second_layer))),
    "masked diagonal": case(
        lambda: halves(optax.masked(free("diagonal"), second_layer)), with_params
    ),
    "partition": case(lambda: parts(free()), strict=False),
    "inject damping": case(lambda: halves(inject(damping=0.1, preconditioner="diagonal"))),
    "inject schedule": case(
        lambda: halves(inject(damping=optax.linear_schedule(1.0, 0.1, UPDATES), warm_start=0.5))
    ),
    "apply_if_finite": case(lambda: optax.apply_if_finite(halves(free("diagonal")), 3)),
    "MultiSteps": case(
        lambda: optax.MultiSteps(optax.chain(free("diagonal"), descend()), 2), strict=False
    ),
    "newton without curvature": case(
        lambda: kfgn.solvers.newton(OBJECTIVE, 0.5, damping=0.1), only_batch
    ),
    "newton schedule": case(
        lambda: kfgn.solvers.newton(
            OBJECTIVE, optax.linear_schedule(1.0, 0.1, UPDATES), damping=0.1
        )
    ),
    "newton masked": case(lambda: halves(optax.masked(newton(), first_layer)), with_params),
    "newton block masked": case(
        lambda: halves(optax.masked(newton("block"), second_layer)), with_params
    ),
    "newton partition": case(lambda: parts(newton()), with_params, strict=False),
    "newton inject": case(
        lambda: inject_newton(OBJECTIVE, optax.linear_schedule(1.0, 0.1, UPDATES), damping=0.1)
    ),
    "newton apply_if_finite": case(lambda: optax.apply_if_finite(halves(newton()), 3)),
    "newton MultiSteps": case(
        lambda: optax.MultiSteps(optax.chain(newton(), descend()), 2), strict=False
    ),
}


@functools.cache
def trained(name: str) -> Record:
    """Trains once for all tests of a case, whichever of them comes first."""
    with jax.numpy_dtype_promotion("strict" if CASES[name].strict else "standard"):
        return train(CASES[name], UPDATES)


each_case = parametrize(CASES)
each_solver = pytest.mark.parametrize("name", SOLVERS)


@each_case
def test_contract(name):
    record = trained(name)
    check_loss_falls(record, CASES[name].falls_to)
    check_structure_is_stable(record)
    check_state_is_named_tuples_of_arrays(record)
    assert record.traces == 1


def test_jit_equals_no_jit():
    # The only control flow of the others is in loops over examples, which are slow as Python.
    check_jit_equals_no_jit(trained("diagonal"), (UPDATES,))


@each_solver
def test_vmap_over_two_problems(name):
    record = trained(name)
    chosen = [record.calls[k] for k in (0, 3)]
    arguments, expected = jax.tree.map(lambda *xs: jnp.stack(xs), *chosen)

    def update(grads, state, params, keywords):
        return record.tx.update(grads, state, params, **keywords)

    assert_close(jax.jit(jax.vmap(update))(*arguments), expected, 1e-3)


@each_solver
def test_donated_buffers(name):
    # Straight from init: no two arrays of a state may share a buffer, or one with params.
    record = trained(name)

    def step(params, state, grads, keywords):
        updates, state = record.tx.update(grads, state, params, **keywords)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    params = make_params()
    state = record.tx.init(params)
    for (grads, _, before, keywords), (updates, after) in record.calls[:2]:
        leaves = jax.tree.leaves((params, state))
        params, state = donating(params, state, grads, keywords)
        kept = [leaf for leaf in leaves if not leaf.is_deleted()]
        assert len(kept) <= 1  # λ, which is not read where it is a number
        assert_close(state, after, 1e-5)
        assert_close(params, optax.apply_updates(before, updates), 1e-5)


@each_solver
def test_bfloat16(name):
    tx = CASES[name].make()
    params, batch = make_params(jnp.bfloat16), make_batch(jnp.bfloat16)
    update, state = jax.jit(tx.update), tx.init(params)
    layout, losses = jax.tree.map(lambda a: (a.shape, a.dtype), state), []
    for _ in range(UPDATES):
        (loss, grads), curvature = measure("kflr", params, batch)
        updates, state = update(grads, state, params, curvature=curvature, batch=batch)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, updates))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == layout
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_block_direction_is_a_function_of_arrays(kind):
    """Not a transformation: jit, vmap and dtypes are all that it meets."""
    dtype = jnp.dtype(kind)
    several = [(make_params(dtype, k), make_batch(dtype, k)) for k in range(2)]

    def direction(params, batch):
        grads = jax.grad(OBJECTIVE)(params, batch)
        return kfgn.solvers.block_gauss_newton_direction(OBJECTIVE, params, batch, grads, DAMPING)[
            0
        ]

    both = jax.jit(jax.vmap(direction))(*jax.tree.map(lambda *xs: jnp.stack(xs), *several))
    alone = [jax.jit(direction)(*one) for one in several]
    assert_close(both, jax.tree.map(lambda *xs: jnp.stack(xs), *alone), 0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves((both, alone))} == {dtype}


# In masks and partitions: the matrix is that of the parameters within.


def dense(matrix_of: Any, params: Any, batch: Any, name: str) -> np.ndarray:
    """A dense matrix of one layer's parameters, in the order of `vector`."""
    flat, unravel = ravel_pytree(params[name])
    found = jax.jit(lambda x, batch: matrix_of(lambda y: {**params, name: unravel(y)}, x, batch))
    return np.asarray(found(flat, batch))


def gauss_newton(params_of, flat, batch):
    inputs, _ = batch
    p = jax.nn.softmax(OBJECTIVE.model(params_of(flat), inputs))
    jacobian = jax.jacobian(lambda x: OBJECTIVE.model(params_of(x), inputs))(flat)
    hessian = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(p)
    return jnp.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian) / len(inputs)


def hessian(params_of, flat, batch):
    return jax.hessian(lambda x: OBJECTIVE(params_of(x), batch))(flat)


@pytest.mark.parametrize("preconditioner", [None, "diagonal", "gauss_newton_diagonal", "kronecker"])
def test_masked_conjugate_gradients_solve_in_what_is_left(preconditioner):
    params, batch = make_params(), make_batch()
    (_, grads), curvature = measure("kflr", params, batch)
    tx = optax.masked(free(preconditioner, tolerance=1e-5), second_layer)
    updates, _ = jax.jit(tx.update)(
        grads, tx.init(params), params, curvature=curvature, batch=batch, all_params=params
    )
    assert_equal(updates["hidden"], grads["hidden"])
    matrix = dense(gauss_newton, params, batch, "out")
    expected = np.linalg.solve(matrix + (DAMPING + L2) * np.eye(len(matrix)), vector(grads["out"]))
    assert_close(vector(updates["out"]), expected, 1e-3)


@pytest.mark.parametrize("name", ["newton masked", "newton block masked", "newton partition"])
def test_masked_newton_solves_in_what_is_left(name):
    (grads, _, params, keywords), (updates, _) = trained(name).calls[0]
    inside, outside = ("out", "hidden") if name == "newton block masked" else ("hidden", "out")
    values, vectors = np.linalg.eigh(dense(hessian, params, keywords["batch"], inside))
    expected = vectors @ ((vectors.T @ vector(grads[inside])) / (np.abs(values) + DAMPING))
    assert_close(vector(updates[inside]), -0.5 * expected, 1e-3)
    if "masked" in name:
        assert_close(updates[outside], jax.tree.map(lambda g: -0.5 * g, grads[outside]), 1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_left_in_a_mask(name):
    (grads, _, params, keywords), _ = trained(name).calls[0]
    tx = optax.masked(SOLVERS[name](), by_layer(hidden=False, out=False))
    state = tx.init(params)
    updates, after = tx.update(grads, state, params, all_params=params, **keywords)
    assert_equal((updates, after), (grads, state))


@pytest.mark.parametrize("name", ["diagonal", "gauss_newton_diagonal", "newton", "newton block"])
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_masked_params_are_asked_for(name, wrapper):
    (grads, _, params, keywords), _ = trained(name).calls[0]
    tx = optax.masked(SOLVERS[name](), second_layer)
    if wrapper == "partition":
        tx = parts(SOLVERS[name]())
    message = r"masked out here: pass them as well, update\(.*, batch=batch, all_params=params\)"
    with pytest.raises(kfgn.errors.ParameterError, match=message):
        tx.update(grads, tx.init(params), params, **keywords)


@pytest.mark.parametrize("name", ["kronecker", "newton block"])
def test_mask_that_splits_a_layer(name):
    (grads, _, params, keywords), _ = trained(name).calls[0]
    mask = jax.tree.map(lambda p: p.ndim == 2, params)
    tx = optax.masked(SOLVERS[name](), mask)
    with pytest.raises(kfgn.errors.ParameterError, match=r"layer 'hidden' is split.*whole layers"):
        tx.update(grads, tx.init(params), params, all_params=params, **keywords)


@pytest.mark.parametrize("make", [free, lambda: free("diagonal"), newton])
def test_other_solvers_take_kernels_without_their_biases(make):
    (grads, _, params, keywords), _ = trained("newton").calls[0]
    tx = optax.masked(make(), jax.tree.map(lambda p: p.ndim == 2, params))
    updates, state = jax.jit(tx.update)(
        grads, tx.init(params), params, all_params=params, **keywords
    )
    for name in params:
        assert_equal(updates[name]["bias"], grads[name]["bias"])
        assert bool(jnp.any(updates[name]["kernel"] != grads[name]["kernel"]))
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0


# Hyperparameters in the state.


def test_injected_numbers_are_used():
    (grads, _, params, keywords), _ = trained("diagonal").calls[0]
    for tx, plain in (
        (inject(damping=0.3, preconditioner="diagonal", power=0.5, tolerance=1e-4),
         free("diagonal", damping=0.3, power=0.5, tolerance=1e-4)),
        (inject_newton(OBJECTIVE, 0.5, damping=0.3),
         kfgn.solvers.newton(OBJECTIVE, 0.5, damping=0.3)),
    ):  # fmt: skip
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params, **keywords)
        expected, _ = jax.jit(plain.update)(grads, plain.init(params), params, **keywords)
        assert_close(updates, expected, 1e-4)
        assert state.hyperparams["damping"] == pytest.approx(0.3)


def test_injected_damping_is_not_taken_for_zero():
    objective = kfgn.Objective(OBJECTIVE.model, LOSS)  # without l2
    for name in ("diagonal", "gauss_newton_diagonal"):
        tx = optax.inject_hyperparams(
            kfgn.transforms.scale_by_conjugate_gradient, static_args=("objective", "max_iterations")
        )(objective, damping=0.1, preconditioner=name)
        assert tx.init(make_params()).hyperparams["damping"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "factory", [kfgn.transforms.scale_by_conjugate_gradient, kfgn.solvers.newton]
)
def test_injection_names_what_must_be_static(factory):
    with pytest.raises(
        kfgn.errors.BatchError, match=r'inject_hyperparams, .*static_args="objective"'
    ):
        optax.inject_hyperparams(factory)(OBJECTIVE, damping=0.1).init(make_params())


def test_injection_of_what_is_the_size_of_an_array():
    tx = optax.inject_hyperparams(
        kfgn.transforms.scale_by_conjugate_gradient, static_args="objective"
    )
    with pytest.raises(
        kfgn.errors.OptionError, match=r'max_iterations .*static_args="max_iterations"'
    ):
        tx(OBJECTIVE, damping=0.1).init(make_params())


def test_apply_if_finite_sees_a_broken_gradient():
    for name in ("apply_if_finite", "newton apply_if_finite"):
        record = trained(name)
        (grads, state, params, keywords), _ = record.calls[1]
        broken = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, after = record.update(broken, state, params, keywords)
        assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
        assert_equal(after.inner_state, state.inner_state)
        assert int(after.notfinite_count) == 1


@pytest.mark.loose_dtypes  # optax.MultiSteps
def test_multi_steps_averages_gradients_and_keeps_the_last_batch():
    record, alone = trained("newton MultiSteps"), trained("newton")
    (first, *_), (idle, _) = record.calls[0]
    (second, _, params, keywords), (updates, _) = record.calls[1]
    assert_equal(idle, jax.tree.map(jnp.zeros_like, idle))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = alone.update(mean, alone.tx.init(params), params, keywords)
    assert_close(updates, jax.tree.map(lambda u: 2 * u, expected), 1e-4)  # whose step is a half


# Other libraries' loops.


@pytest.mark.parametrize(
    "name", [*SOLVERS, "adaptive, warm", "inject schedule", "newton inject", "newton masked"]
)
def test_checkpoints_continue_alike(name, tmp_path):
    record = trained(name)
    (_, saved, _, _), _ = record.calls[3]
    fresh = jax.eval_shape(record.tx.init, make_params())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"state": saved})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", {"state": fresh})["state"]
    assert_equal(restored, saved)
    (grads, _, params, keywords), expected = record.calls[3]
    assert_equal(record.update(grads, restored, params, keywords), expected)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("name", SOLVERS)
def test_train_state(name):
    """apply_gradients hands on no keyword, so update is called by hand."""
    record = trained(name)
    (grads, _, params, keywords), (updates, after) = record.calls[0]
    loop = TrainState.create(apply_fn=OBJECTIVE.model, params=params, tx=record.tx)
    missing = "needs the curvature" if name not in ("newton", "newton block") else "batch=batch"
    with pytest.raises(kfgn.errors.OptionError, match=missing):
        loop.apply_gradients(grads=grads)
    found, state = record.update(grads, loop.opt_state, loop.params, keywords)
    loop = loop.replace(
        step=loop.step + 1, params=optax.apply_updates(params, found), opt_state=state
    )
    assert_equal((found, loop.opt_state), (updates, after))
    state_dict = serialization.to_state_dict(loop.opt_state)
    fresh = loop.tx.init(loop.params)
    assert_equal(serialization.from_state_dict(fresh, state_dict), loop.opt_state)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


@pytest.mark.loose_dtypes  # the module computes in its own dtypes
@pytest.mark.parametrize("name", ["gauss_newton_diagonal", "kronecker", "newton", "newton block"])
def test_nnx_optimizer(name):
    model = Network(nnx.Rngs(0))
    nnx.update(model, nnx.State(make_params()))
    graph, params = nnx.split(model, nnx.Param)
    objective = kfgn.Objective(lambda params, x: nnx.merge(graph, params)(x), LOSS, l2=L2)
    options: dict[str, Any] = {"damping": DAMPING}
    if name.startswith("newton"):
        options["structure"] = "block" if name == "newton block" else "full"
        direction = kfgn.transforms.scale_by_newton(objective, **options)
    else:
        blocks = kfgn.layers.find_blocks(objective, params, make_batch())
        direction = kfgn.transforms.scale_by_conjugate_gradient(
            objective, blocks=blocks, preconditioner=name, **options
        )
    optimizer = nnx.Optimizer(model, halves(direction), wrt=nnx.Param)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr")

    @nnx.jit
    def step(model, optimizer, batch):
        (loss, grads), curvature = curvature_fn(nnx.state(model, nnx.Param), batch)
        optimizer.update(model, grads, curvature=curvature, batch=batch)
        return loss

    for k in range(3):
        step(model, optimizer, make_batch(seed=k))
    expected = trained(name).calls[3][0][2]
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(found, expected, 1e-3)
    assert int(optax.tree_utils.tree_get(nnx.as_pure(optimizer.opt_state), "count")) == 3
