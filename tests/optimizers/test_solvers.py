"""The solvers against dense truth: conjugate gradients, Newton, general minimizers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from kfgn.optimizers.minimize import MINIMIZERS
from tests.tables.small import (
    L2,
    OBJECTIVE,
    assert_close,
    assert_equal,
    make_batch,
    make_params,
)

DAMPING = 2.0**-4


def vector(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


@jax.jit
def dense_gauss_newton(params, batch):
    """`J'HJ` of the small network's cross-entropy by jax.jacobian, `[P, P]`."""
    flat, unravel = ravel_pytree(params)
    inputs, _ = batch
    logits = OBJECTIVE.model(params, inputs)
    p = jax.nn.softmax(logits)
    jacobian = jax.jacobian(lambda x: OBJECTIVE.model(unravel(x), inputs))(flat)
    hessian = jax.vmap(lambda q: jnp.diag(q) - jnp.outer(q, q))(p)
    return jnp.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian) / len(inputs)


measure = kfgn.value_grad_and_curvature(OBJECTIVE, "kflr")


def dense_hessian(objective, params, batch) -> np.ndarray:
    """The objective's Hessian by jax.hessian, `[P, P]`."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(lambda x, data: jax.hessian(lambda y: objective(unravel(y), data))(x))
    return np.asarray(hessian(flat, batch))


def gradient_of(objective, params, batch):
    return jax.jit(lambda p, data: jax.grad(objective)(p, data))(params, batch)


@functools.cache
def curvature_fn() -> Any:
    return jax.jit(measure)


def problem(dtype: Any = jnp.float64, seed: int = 0) -> tuple:
    params, batch = make_params(dtype, seed), make_batch(dtype, seed)
    (_, grads), curvature = curvature_fn()(params, batch)
    return params, batch, grads, curvature


def solver(**options: Any) -> optax.GradientTransformationExtraArgs:
    options = {"damping": DAMPING, "tolerance": 1e-12, "max_iterations": 300, **options}
    if options.get("preconditioner") == "kronecker":
        options["blocks"] = kfgn.layers.find_blocks(OBJECTIVE, make_params(), make_batch())
    return kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, **options)


def run(tx, problem, state=None, **extra):
    params, batch, grads, curvature = problem
    state = tx.init(params) if state is None else state
    extra = {"curvature": curvature, "batch": batch, **extra}
    return jax.jit(tx.update)(grads, state, params, **extra)


# Conjugate gradients alone.


def quadratic(size: int = 12, condition: float = 1e2, seed: int = 0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = basis * np.geomspace(1, condition, size) @ basis.T
    return jnp.asarray(matrix), jnp.asarray(rng.normal(size=size))


def test_cg_solves_in_at_most_n_iterations(x64):
    matrix, b = quadratic(condition=10)
    found = kfgn.solvers.conjugate_gradient(lambda v: matrix @ v, b, tolerance=1e-8)
    assert_close(found.x, np.linalg.solve(matrix, b), 1e-7)
    assert_close(found.product, matrix @ found.x, 1e-8)
    assert 1 < int(found.iterations) <= len(b)
    assert float(found.residual) <= 1.01e-8 and not bool(found.negative_curvature)
    assert float(found.value) == pytest.approx(float(-0.5 * b @ np.linalg.solve(matrix, b)))


def test_cg_with_the_exact_inverse_needs_one_iteration(x64):
    matrix, b = quadratic(condition=1e6)
    inverse = jnp.linalg.inv(matrix)
    found = kfgn.solvers.conjugate_gradient(
        lambda v: matrix @ v, b, precondition=lambda r: inverse @ r, tolerance=1e-6
    )
    assert int(found.iterations) == 1
    assert_close(found.x, np.linalg.solve(matrix, b), 1e-6)


def test_cg_from_the_solution_needs_none(x64):
    matrix, b = quadratic()
    found = kfgn.solvers.conjugate_gradient(
        lambda v: matrix @ v, b, start=jnp.linalg.solve(matrix, b), tolerance=1e-8
    )
    assert int(found.iterations) == 0 and float(found.residual) < 1e-10


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_residual_rule(tolerance, x64):
    matrix, b = quadratic(size=30, condition=1e3)
    solve = functools.partial(kfgn.solvers.conjugate_gradient, lambda v: matrix @ v, b)
    found = solve(tolerance=tolerance)
    residual = np.linalg.norm(b - matrix @ found.x) / np.linalg.norm(b)
    assert residual <= tolerance
    before = solve(tolerance=None, max_iterations=int(found.iterations) - 1)
    assert float(before.residual) > tolerance


def model_values(matrix, b, count):
    """The quadratic model's values along plain conjugate gradients, in numpy."""
    x, r = np.zeros_like(b), b
    p, values = r, [0.0]
    for _ in range(count):
        image = matrix @ p
        step = r @ r / (p @ image)
        x, after = x + step * p, r - step * image
        p, r = after + (after @ after) / (r @ r) * p, after
        values.append(0.5 * x @ matrix @ x - b @ x)
    return values


def test_progress_rule_is_that_of_martens(x64):
    matrix, b = quadratic(size=200, condition=1e4)
    values = model_values(np.asarray(matrix), np.asarray(b), 199)
    found = []
    for epsilon in (5e-2, 5e-3, 5e-4):

        def stops(i, epsilon=epsilon):
            k = max(10, i // 10)
            return i > k and (values[i] - values[i - k]) / values[i] < k * epsilon

        expected = next(i for i in range(len(values)) if stops(i))
        result = kfgn.solvers.conjugate_gradient(
            lambda v: matrix @ v, b, tolerance=None, progress=epsilon, max_iterations=200
        )
        assert abs(int(result.iterations) - expected) <= 1  # roundoff delays
        assert float(result.value) == pytest.approx(values[expected], rel=0.01)
        found.append(expected)
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("bent", [0, -1])
def test_negative_curvature_is_reported_with_a_usable_direction(bent, x64):
    values = np.geomspace(1, 10, 8)
    values[bent] = -1.0
    b = jnp.ones(8)
    found = kfgn.solvers.conjugate_gradient(lambda v: jnp.asarray(values) * v, b, tolerance=1e-10)
    assert bool(found.negative_curvature)
    assert np.all(np.isfinite(found.x)) and float(b @ found.x) > 0 and float(found.value) < 0
    at_once = kfgn.solvers.conjugate_gradient(lambda v: -v, b)
    assert bool(at_once.negative_curvature) and int(at_once.iterations) == 0
    assert_close(at_once.x, b, 1e-12)


def test_nothing_to_solve():
    found = kfgn.solvers.conjugate_gradient(lambda v: v, {"a": jnp.zeros(3)})
    assert not np.any(found.x["a"]) and int(found.iterations) == 0
    assert not bool(found.negative_curvature) and float(found.residual) == 0


# The direction.


@pytest.mark.parametrize(
    "preconditioner", [None, "diagonal", "gauss_newton_diagonal", "kronecker", "eigen"]
)
def test_direction_is_the_dense_solution(preconditioner, x64):
    options = {"preconditioner": preconditioner}
    if preconditioner == "eigen":
        options = {"preconditioner": "kronecker", "inverse": "eigen"}
    params, batch, grads, _ = whole = problem()
    direction, state = run(solver(**options), whole)
    matrix = dense_gauss_newton(params, batch)
    g = vector(grads)
    expected = np.linalg.solve(matrix + (DAMPING + L2) * np.eye(len(g)), g)
    assert_close(vector(direction), expected, 1e-9)
    assert float(state.residual) < 1e-11 and int(state.count) == 1
    assert int(state.iterations) > 0 and not bool(state.negative_curvature)


def test_preconditioners_save_iterations(x64):
    """Inputs of very different scales, and little damping: condition 1e6 and more."""

    def network(params, inputs):
        hidden = jnp.tanh(inputs @ params["in"]["kernel"] + params["in"]["bias"])
        return hidden @ params["out"]["kernel"] + params["out"]["bias"]

    objective = kfgn.Objective(network, kfgn.losses.half_squared_error)
    rng, scales = np.random.default_rng(0), np.geomspace(0.01, 10, 8)
    kernels = 0.5 * rng.normal(size=(8, 10)) / scales[:, None] / 8**0.5, rng.normal(size=(10, 3))
    params = {
        name: {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])}
        for name, kernel in zip(("in", "out"), kernels, strict=True)
    }
    targets = jnp.asarray(rng.normal(size=(256, 3)))
    batch = (jnp.asarray(rng.normal(size=(256, 8)) * scales), targets)
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    iterations = {}
    for name in (None, "diagonal", "gauss_newton_diagonal", "factored", "eigen"):
        tx = kfgn.transforms.scale_by_conjugate_gradient(
            objective,
            blocks=kfgn.layers.find_blocks(objective, params, batch),
            damping=1e-5,
            tolerance=1e-4,
            max_iterations=2000,
            preconditioner="kronecker" if name in ("factored", "eigen") else name,
            inverse="eigen" if name == "eigen" else "factored",
        )
        _, state = run(tx, (params, batch, grads, curvature))
        iterations[name] = int(state.iterations)
    for name in list(iterations)[1:]:
        assert iterations[name] < 0.5 * iterations[None], iterations


def test_exact_factors_of_one_linear_layer_need_one_iteration(x64):
    """With squared error, G is a multiple of I and `Q ⊗ G` is the exact matrix."""
    objective = kfgn.Objective(lambda p, x: x @ p["kernel"], kfgn.losses.half_squared_error)
    params = {"kernel": jnp.zeros((5, 2))}
    rng = np.random.default_rng(0)
    batch = (jnp.asarray(rng.normal(size=(40, 5)) * [10, 3, 1, 1, 0.1]), jnp.ones((40, 2)))
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    tx = kfgn.transforms.scale_by_conjugate_gradient(
        objective,
        blocks=kfgn.layers.find_blocks(objective, params, batch),
        damping=0.3,
        tolerance=1e-10,
        preconditioner="kronecker",
        inverse="eigen",
    )
    _, state = run(tx, (params, batch, grads, curvature))
    assert int(state.iterations) == 1


def test_curvature_of_other_examples_and_of_micro_batches(x64):
    params, batch, grads, _ = problem()
    halves = [tuple(a[k : k + 16] for a in batch) for k in (0, 16)]
    parts = [curvature_fn()(params, half)[1] for half in halves]
    g = vector(grads)
    shift = (DAMPING + L2) * np.eye(len(g))
    for curvature, examples in ((parts[0], halves[0]), (kfgn.average_curvature(parts), batch)):
        direction, _ = run(solver(), (params, batch, grads, curvature))
        expected = np.linalg.solve(dense_gauss_newton(params, examples) + shift, g)
        assert_close(vector(direction), expected, 1e-9)


def test_empirical_fisher_diagonal(x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    found = jax.jit(kfgn.empirical_fisher(OBJECTIVE).diagonal_by_parameter)(params, batch)

    def one(x, y):
        return jax.grad(lambda p: OBJECTIVE.mean_loss(p, (x[None], y[None])))(params)

    each = jax.jit(jax.vmap(one))(*batch)
    assert_close(found, jax.tree.map(lambda g: jnp.mean(g**2, axis=0), each), 1e-12)


def test_warm_start(x64):
    whole = problem()
    cold, warm = solver(), solver(warm_start=1.0)
    solution, state = run(warm, whole)
    assert_close(run(cold, whole)[0], solution, 1e-10)
    again, after = run(warm, whole, state)
    assert int(after.iterations) <= 1 < int(state.iterations)
    assert_close(again, solution, 1e-10)
    assert_close(after.previous, run(warm, whole)[1].previous, 1e-10)
    half, later = run(solver(warm_start=0.5), whole, state)
    assert int(later.iterations) > 0 and int(cold.init(whole[0]).iterations) == 0
    assert_close(half, solution, 1e-9)
    assert cold.init(whole[0]).previous == {}


# Levenberg-Marquardt.


def adaptive(**options: Any) -> optax.GradientTransformationExtraArgs:
    damping = kfgn.transforms.LevenbergMarquardt(1.0, 1e-6, 1e6, period=1, decay=2 / 3)
    return solver(damping=damping, **options)


def test_ratio_is_that_of_the_whole_step(x64):
    params, batch, _, _ = whole = problem()
    direction, state = run(adaptive(), whole)
    d, g = vector(direction), vector(whole[2])
    matrix = dense_gauss_newton(params, batch) + L2 * np.eye(len(d))
    moved = jax.tree.map(jnp.subtract, params, direction)
    change = OBJECTIVE(moved, batch) - OBJECTIVE(params, batch)
    ratio = float(change / (0.5 * d @ matrix @ d - g @ d))
    assert float(state.reduction_ratio) == pytest.approx(ratio, rel=1e-5)
    assert ratio > 0.75 and float(state.damping) == pytest.approx(2 / 3)


def test_damping_follows_the_ratio():
    params, _, grads, curvature = problem(jnp.float32)
    tx = adaptive(tolerance=1e-5)
    # An objective that changes by just so much of what the model predicts.
    update = jax.jit(
        lambda value: tx.update(
            grads,
            tx.init(params),
            params,
            curvature=curvature._replace(displaced=jax.tree_util.Partial(first, value)),
        )
    )
    _, state = update(curvature.value - 1)
    predicted = -1 / state.reduction_ratio
    assert float(predicted) < 0
    for ratio, expected in ((0.1, 1.5), (0.5, 1.0), (0.9, 2 / 3)):
        updates, after = update(curvature.value + ratio * predicted)
        assert float(after.damping) == pytest.approx(expected)
        assert float(after.reduction_ratio) == pytest.approx(ratio, rel=1e-3)
        assert int(after.count) == 1 and int(after.skipped) == 0
    updates, after = update(jnp.asarray(jnp.nan, jnp.float32))
    assert float(after.damping) == pytest.approx(1.5)
    assert int(after.skipped) == 1 and int(after.count) == 0
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))


def test_a_fixed_damping_may_follow_a_schedule():
    whole = problem(jnp.float32)
    schedule = optax.linear_schedule(0.5, 0.1, 1)
    tx = optax.inject_hyperparams(
        lambda damping: kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, damping=damping)
    )(schedule)
    update = jax.jit(lambda state: tx.update(whole[2], state, whole[0], curvature=whole[3]))
    state = tx.init(whole[0])
    for damping in (0.5, 0.1):
        updates, state = update(state)
        expected, _ = run(
            kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, damping=damping), whole
        )
        assert_close(updates, expected, 1e-4)


def first(value, direction):
    return value


def test_broken_batch_changes_nothing_but_its_count():
    for tx in (adaptive(tolerance=0.1, warm_start=0.9), solver(tolerance=0.1)):
        params, batch, grads, curvature = problem(jnp.float32)
        _, state = run(tx, (params, batch, grads, curvature))
        broken = (batch[0].at[0, 0].set(jnp.nan), batch[1])
        (_, bad), curvature = curvature_fn()(params, broken)
        updates, after = run(tx, (params, broken, bad, curvature), state)
        assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
        assert_equal(after._replace(skipped=state.skipped, streak=state.streak), state)
        assert int(after.skipped) == 1


# Training, chains and line searches.


def train(tx, updates=12, dtype=jnp.float32, **extra):
    """Losses on one batch; `extra` may be functions of value and gradient."""
    params, batch = make_params(dtype), make_batch(dtype)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        (value, grads), curvature = measure(params, batch)
        more = {n: f(value, grads) for n, f in extra.items()}
        updates, state = tx.update(grads, state, params, curvature=curvature, batch=batch, **more)
        return optax.apply_updates(params, updates), state, value

    for _ in range(updates):
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return losses, state


SEARCH = {
    "value": lambda value, grads: value,
    "grad": lambda value, grads: grads,
    "value_fn": lambda value, grads: OBJECTIVE,
}


@pytest.mark.parametrize("preset", list(kfgn.transforms.HESSIAN_FREE_PRESETS))
def test_presets_train(preset):
    options = kfgn.transforms.HESSIAN_FREE_PRESETS[preset]
    tx = kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, **options)
    losses, state = train(optax.chain(tx, optax.scale(-1.0)))
    assert losses[-1] < {"cnn": 0.7, "martens": 0.9}[preset] * losses[0]  # the latter's λ is 45
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert int(optax.tree_utils.tree_get(state, "count")) == len(losses)


@pytest.mark.loose_dtypes  # optax's line searches
@pytest.mark.parametrize("name", ["backtracking", "zoom", "kronecker", "lbfgs"])
def test_line_search_after_curvature(name):
    backtracking = optax.scale_by_backtracking_linesearch(15, slope_rtol=1e-4, store_grad=True)
    zoom = optax.scale_by_zoom_linesearch(15)
    direction = kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE)
    search = {"backtracking": backtracking, "zoom": zoom, "kronecker": backtracking}.get(name)
    if name == "kronecker":
        blocks = kfgn.layers.find_blocks(OBJECTIVE, make_params(), make_batch())
        direction = kfgn.transforms.scale_by_kronecker(blocks, 0.01)
    tx = kfgn.transforms.without_curvature(optax.lbfgs())
    if name != "lbfgs":
        tx = optax.chain(direction, optax.scale(-1.0), kfgn.transforms.without_curvature(search))
    losses, _ = train(tx, **SEARCH)
    assert np.all(np.diff(losses) < 1e-6)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.loose_dtypes
def test_without_the_wrapper_a_line_search_refuses():
    tx = optax.chain(
        kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE),
        optax.scale_by_backtracking_linesearch(5),
    )
    with pytest.raises(TypeError, match="curvature"):
        train(tx, 1, **SEARCH)


def test_without_curvature_passes_the_rest_on():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = kfgn.transforms.without_curvature(inner)
    tx.update({}, tx.init({}), {}, curvature=1, value=2)
    assert seen == {"value": 2}
    plain = kfgn.transforms.without_curvature(optax.sgd(1.0))
    grads = {"a": jnp.ones(2)}
    assert_close(plain.update(grads, plain.init(grads), curvature=1)[0], {"a": -jnp.ones(2)}, 0)
    with pytest.raises(kfgn.errors.OptionError, match="an optax transformation, found a int"):
        kfgn.transforms.without_curvature(3)


def test_bfloat16_parameters():
    losses, state = train(
        optax.chain(
            kfgn.transforms.scale_by_conjugate_gradient(OBJECTIVE, warm_start=0.5),
            optax.scale(-1.0),
        ),
        dtype=jnp.bfloat16,
    )
    assert losses[-1] < 0.8 * losses[0]
    previous = optax.tree_utils.tree_get(state, "previous")
    assert {leaf.dtype for leaf in jax.tree.leaves(previous)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner": "jacobi"}, "preconditioner must be one of"),
        ({"preconditioner": "kronecker"}, "needs blocks=kfgn.layers"),
        ({"l2": 0.0, "preconditioner": "diagonal", "damping": 0.0}, "needs a positive damping"),
        ({"damping": -1.0}, "damping must be"),
        ({"warm_start": 1.5}, "warm_start must be"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"progress": 0.0}, "progress must be"),
        ({"max_iterations": 0}, "max_iterations must be"),
        ({"max_iterations": 2.5}, "max_iterations must be"),
        ({"damping": kfgn.transforms.Greedy(1.0)}, "number or a kfgn.transforms.StepDamping"),
        ({"power": 0.0}, "power must be"),
    ],
)
def test_bad_options(options, message):
    options = dict(options)
    with pytest.raises(kfgn.errors.OptionError, match=message):
        objective = kfgn.Objective(OBJECTIVE.model, OBJECTIVE.loss, options.pop("l2", L2))
        kfgn.transforms.scale_by_conjugate_gradient(objective, **options)


def test_what_update_needs():
    params, _, grads, curvature = problem(jnp.float32)
    tx = solver(preconditioner="diagonal")
    with pytest.raises(kfgn.errors.OptionError, match="batch=batch"):
        tx.update(grads, tx.init(params), params, curvature=curvature)
    with pytest.raises(kfgn.errors.OptionError, match="needs the curvature"):
        tx.update(grads, tx.init(params), params)
    newton = kfgn.transforms.scale_by_newton(OBJECTIVE)
    with pytest.raises(kfgn.errors.OptionError, match="batch=batch"):
        newton.update(grads, newton.init(params), params)


# The block-diagonal Gauss-Newton direction.


def test_block_direction_is_the_dense_solution(x64):
    params, batch, grads, _ = problem()
    solve = jax.jit(
        lambda p, b, g: kfgn.solvers.block_gauss_newton_direction(
            OBJECTIVE, p, b, g, DAMPING, tolerance=1e-12
        )
    )
    direction, residuals = solve(params, batch, grads)
    matrix = np.asarray(dense_gauss_newton(params, batch))
    start = 0
    for name in params:  # a layer's parameters lie side by side in the raveled vector
        g = vector(grads[name])
        own = slice(start, start + len(g))
        block = matrix[own, own] + (DAMPING + L2) * np.eye(len(g))
        assert_close(vector(direction[name]), np.linalg.solve(block, g), 1e-10)
        start += len(g)
        assert residuals[name].shape == () and float(residuals[name]) < 1e-11


def test_block_direction_of_stacks_and_of_parameters_in_no_layer(x64):
    def model(params, inputs):
        hidden = inputs
        for k in range(2):
            hidden = jnp.tanh(hidden @ params["stack"][k])
        return hidden * jnp.exp(params["scale"])

    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    rng = np.random.default_rng(0)
    params = {"stack": jnp.asarray(rng.normal(size=(2, 3, 3))), "scale": jnp.zeros(3)}
    batch = (jnp.asarray(rng.normal(size=(10, 3))), jnp.asarray(rng.normal(size=(10, 3))))
    grads = gradient_of(objective, params, batch)
    solve = functools.partial(kfgn.solvers.block_gauss_newton_direction, objective, tolerance=1e-12)
    direction, _ = jax.jit(lambda p, b, g: solve(p, b, g, 0.1))(params, batch, grads)
    for name in ("stack", "scale"):
        # With squared error the Gauss-Newton matrix is J'J, here of one parameter.
        pushed = jax.jacobian(lambda x, name=name: model({**params, name: x}, batch[0]))
        rows = np.asarray(grads[name]).reshape((2, 9) if name == "stack" else (1, 3))
        jacobians = np.asarray(jax.jit(pushed)(params[name])).reshape(10 * 3, *rows.shape)
        expected = [
            np.linalg.solve(j.T @ j / 10 + 0.1 * np.eye(len(r)), r)
            for j, r in zip(jacobians.swapaxes(0, 1), rows, strict=True)
        ]
        assert_close(direction[name], np.stack(expected).reshape(grads[name].shape), 1e-9)


# Newton.


def logistic(count: int = 60) -> tuple:
    """A strictly convex objective: softmax regression with a penalty."""
    objective = kfgn.Objective(lambda p, x: x @ p["kernel"] + p["bias"], OBJECTIVE.loss, l2=1e-2)
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    return objective, params, make_batch(params["bias"].dtype, count=count)


def test_newton_converges_quadratically(x64):
    objective, params, batch = logistic()
    tx = kfgn.solvers.newton(objective)
    state, norms = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, grads

    for _ in range(8):
        params, state, grads = step(params, state, batch)
        norms.append(float(optax.tree_utils.tree_norm(grads)))
    assert norms[-1] < 1e-12
    tail = [n for n in norms if 1e-7 < n < 0.1]
    # The number of right digits doubles: log e_{k+1} / log e_k is near 2.
    assert np.log(tail[-1]) / np.log(tail[-2]) > 1.6
    assert int(state[0].count) == 8 and int(state[0].negative) == 0


@pytest.mark.parametrize("structure", ["full", "block"])
def test_newton_minimizes_a_quadratic_in_one_step(structure, x64):
    objective = kfgn.Objective(
        lambda p, x: x @ p["kernel"] + p["bias"], kfgn.losses.half_squared_error, l2=0.1
    )
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.ones(3)}
    batch = (jnp.asarray(rng.normal(size=(20, 4))), jnp.asarray(rng.normal(size=(20, 3))))
    tx = kfgn.solvers.newton(objective, structure=structure)
    grads = gradient_of(objective, params, batch)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    after = gradient_of(objective, optax.apply_updates(params, updates), batch)
    assert np.abs(vector(after)).max() < 1e-12


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_newton_is_the_dense_solution(damping, x64):
    """On an indefinite Hessian: absolute values of its eigenvalues."""
    params, batch, grads, _ = problem()
    solve = jax.jit(functools.partial(kfgn.solvers.newton_direction, OBJECTIVE, damping=damping))
    found = solve(params, batch, grads)
    hessian = dense_hessian(OBJECTIVE, params, batch)
    values, vectors = np.linalg.eigh(hessian)
    assert values[0] < 0 and int(found.negative) == np.sum(values < 0)
    assert float(found.smallest) == pytest.approx(values[0])
    expected = vectors @ ((vectors.T @ vector(grads)) / (np.abs(values) + damping))
    assert_close(vector(found.direction), expected, 1e-8)
    assert expected @ vector(grads) > 0
    convex, params, batch = logistic()
    grads = gradient_of(convex, params, batch)
    solve = jax.jit(functools.partial(kfgn.solvers.newton_direction, convex, damping=damping))
    direction = solve(params, batch, grads).direction
    hessian = dense_hessian(convex, params, batch)
    dense = np.linalg.solve(hessian + damping * np.eye(len(hessian)), vector(grads))
    assert_close(vector(direction), dense, 1e-9)


def test_block_newton_is_the_dense_solution_of_each_block(x64):
    params, batch, grads, _ = problem()
    solve = jax.jit(
        functools.partial(kfgn.solvers.newton_direction, OBJECTIVE, structure="block", damping=0.1)
    )
    found = solve(params, batch, grads)
    hessian = dense_hessian(OBJECTIVE, params, batch)
    start, smallest = 0, []
    for name in params:
        g = vector(grads[name])
        own = slice(start, start + len(g))
        values, vectors = np.linalg.eigh(hessian[own, own])
        expected = vectors @ ((vectors.T @ g) / (np.abs(values) + 0.1))
        assert_close(vector(found.direction[name]), expected, 1e-9)
        smallest.append(values[0])
        start += len(g)
    assert float(found.smallest) == pytest.approx(min(smallest))


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("structure", ["full", "block"])
def test_newton_with_line_search(structure):
    tx = optax.chain(
        kfgn.transforms.scale_by_newton(OBJECTIVE, damping=1e-3, structure=structure),
        optax.scale(-1.0),
        kfgn.transforms.without_curvature(optax.scale_by_backtracking_linesearch(20)),
    )
    losses, _ = train(tx, **SEARCH)
    assert np.all(np.diff(losses) < 1e-6) and losses[-1] < 0.7 * losses[0]


def test_newton_skips_a_broken_batch():
    params, (inputs, labels) = make_params(), make_batch()
    tx = kfgn.transforms.scale_by_newton(OBJECTIVE, damping=0.1)
    grads = gradient_of(OBJECTIVE, params, (inputs, labels))
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params, batch=(inputs, labels))
    broken = (inputs.at[0, 0].set(jnp.nan), labels)
    updates, after = update(grads, state, params, batch=broken)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(after.skipped) == 1
    assert_equal(after._replace(skipped=state.skipped, streak=state.streak), state)


def test_newton_errors():
    params, batch = make_params(), make_batch()
    with pytest.raises(kfgn.errors.OptionError, match="structure must be one of"):
        kfgn.transforms.scale_by_newton(OBJECTIVE, structure="diagonal")
    with pytest.raises(kfgn.errors.OptionError, match="damping must be"):
        kfgn.solvers.newton(OBJECTIVE, damping=-1.0)
    with pytest.raises(kfgn.errors.OptionError, match=r"must be a kfgn\.Objective"):
        kfgn.transforms.scale_by_newton(lambda p, b: 0.0)
    with pytest.raises(kfgn.errors.ParameterError, match="must be like params"):
        kfgn.solvers.newton_direction(OBJECTIVE, params, batch, params["out"])


# General minimizers.


@pytest.mark.loose_dtypes
def test_minimizers_agree(x64):
    objective, params, batch = logistic()
    found, seen = {}, []
    for method in MINIMIZERS:
        seen.clear()
        found[method] = result = kfgn.solvers.minimize(
            objective,
            params,
            batch,
            method,
            max_iterations=200,
            tolerance=1e-7,
            callback=lambda p, value: seen.append((p, value)),
            options={"ftol": 0.0} if method == "l-bfgs-b" else None,
        )
        assert result.converged, (method, result.message)
        assert result.evaluations >= len(result.values)
        assert [value for _, value in seen] == pytest.approx(result.values[1:])
        assert result.values[0] == pytest.approx(float(objective(params, batch)))
        assert np.abs(vector(gradient_of(objective, result.params, batch))).max() < 1.1e-7
        assert result.message
    vectors = [vector(result.params) for result in found.values()]
    for other in vectors[1:]:
        np.testing.assert_allclose(other, vectors[0], atol=1e-5)


@pytest.mark.loose_dtypes
@pytest.mark.parametrize("method", ["l-bfgs-b", "cg", "optax-lbfgs"])
def test_minimizers_stop_and_turn_back(method):
    """Few iterations; and an objective that is infinite beyond a wall."""
    if method != "optax-lbfgs":  # whose line search takes seconds to compile
        few = kfgn.solvers.minimize(*logistic(), method, max_iterations=2)
        assert not few.converged and len(few.values) == 3

    def wall(p, _):
        value = jnp.sum((p - 3.0) ** 2)
        return jnp.where(jnp.all(p < 2.0), value, jnp.inf)

    start = jnp.zeros(2)
    found = kfgn.solvers.minimize(wall, start, None, method, max_iterations=20)
    assert bool(jnp.all(jnp.isfinite(found.params))) and bool(jnp.all(found.params < 2.0))
    assert float(wall(found.params, None)) <= float(wall(start, None))


def test_minimize_errors():
    objective, params, batch = logistic()
    with pytest.raises(kfgn.errors.OptionError, match="method must be one of"):
        kfgn.solvers.minimize(objective, params, batch, "sgd")
    with pytest.raises(kfgn.errors.OptionError, match="objective must be callable"):
        kfgn.solvers.minimize(3.0, params, batch)
    with pytest.raises(kfgn.errors.OptionError, match="max_iterations must be"):
        kfgn.solvers.minimize(objective, params, batch, max_iterations=0)
    broken = (batch[0].at[0, 0].set(jnp.nan), batch[1])
    with pytest.raises(kfgn.errors.ParameterError, match="start from others"):
        kfgn.solvers.minimize(objective, params, broken)
