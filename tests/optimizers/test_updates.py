"""The numbers of an update, against dense algebra; and what broken batches may not do to it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables.small import (
    CLASSES,
    INPUTS,
    L2,
    OBJECTIVE,
    assert_close,
    assert_equal,
    make_batch,
    make_params,
    make_step,
    network,
)

LAYERS = ("hidden", "out")


# The recipe, written out once more with dense matrices and numpy.


def as_matrix(layer: Any) -> np.ndarray:
    return np.concatenate([np.asarray(layer["kernel"]), np.asarray(layer["bias"])[None]])


def as_vector(tree: Any) -> np.ndarray:
    """All layers' matrices, row by row, as one vector."""
    return np.concatenate([as_matrix(tree[name]).ravel() for name in LAYERS])


def block_inverse(q: np.ndarray, g: np.ndarray, damping: float, inverse: str) -> np.ndarray:
    """The damped inverse of one layer's block as a dense matrix, eq. (35) or (36)."""
    if inverse == "eigen":
        return np.linalg.inv(np.kron(q, g) + damping * np.eye(len(q) * len(g)))
    # Trace norms of Q ⊗ I and I ⊗ G, eq. (38).
    balance = np.sqrt(np.trace(q) * len(g) / (np.trace(g) * len(q)))
    q = q + balance * np.sqrt(damping) * np.eye(len(q))
    g = g + np.sqrt(damping) / balance * np.eye(len(g))
    return np.linalg.inv(np.kron(q, g))


def dense_gauss_newton(params: Any, batch: Any) -> np.ndarray:
    """The full Gauss-Newton matrix of the mean loss, in the order of `as_vector`."""
    inputs, labels = batch
    flat, unravel = ravel_pytree(params)
    places = unravel(jnp.arange(flat.size, dtype=flat.dtype))
    jacobian = jax.jacobian(lambda p: network(unravel(p), inputs))(flat)

    def loss(outputs, label):
        return -jax.nn.log_softmax(outputs)[label]

    hessian = jax.vmap(jax.hessian(loss))(network(params, inputs), labels)
    full = np.einsum("nkp,nkl,nlq->pq", jacobian, hessian, jacobian) / len(labels)
    order = as_vector(places).astype(int)
    return full[np.ix_(order, order)]


class Settings(NamedTuple):
    inverse: str = "factored"
    momentum: bool = True
    decay: float = 0.6
    refresh: int = 1
    gamma: float | None = 0.5
    gamma_period: int = 3
    tau: float = 0.2
    tau_period: int = 2
    low: float = 0.25
    high: float = 0.75
    omega: float = 0.9
    agreement: tuple[float, float] | None = (0.5, 0.6)

    def optimizer(self, params, batch):
        return kfgn.kfra(
            OBJECTIVE,
            params,
            batch,
            inverse=self.inverse,
            learning_rate=1.0,
            momentum=self.momentum,
            decay=self.decay,
            refresh_factors_every=1,
            refresh_inverse_every=self.refresh,
            factor_damping=None
            if self.gamma is None
            else kfgn.transforms.Greedy(self.gamma, period=self.gamma_period, decay=self.omega),
            step_damping=kfgn.transforms.LevenbergMarquardt(
                self.tau,
                period=self.tau_period,
                decay=self.omega,
                thresholds=(self.low, self.high),
                agreement=self.agreement,
            ),
        )


class Reference:
    """Appendix C of the paper step by step, with every matrix formed."""

    def __init__(self, settings: Settings):
        self.settings, self.count, self.previous = settings, 0, None
        self.gamma, self.tau, self.ratio = settings.gamma, settings.tau, 1.0
        self.checked, self.refused = 0, 0  # between the updates at which τ adapts; altogether
        self.evidence, self.agreement = np.zeros(2), 1.0
        self.judged: list[float] = []  # the agreements where ρ alone would lower τ
        self.inverses: list[np.ndarray] = []
        self.factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def update(self, params, batch, gradient, factors) -> np.ndarray:
        s = self.settings
        self.count += 1
        beta = min(s.decay, 1 - 1 / self.count)
        for name in LAYERS:
            new = [np.asarray(f) for f in factors[name]]
            old = self.factors.get(name, new)
            pairs = zip(old, new, strict=True)
            self.factors[name] = tuple(beta * a + (1 - beta) * b for a, b in pairs)
        g, curvature = as_vector(gradient), dense_gauss_newton(params, batch)
        agreed = self.agreement  # as the updates before say

        def solve(inverses):
            """The best step in the span of the direction and the last step, and its value."""
            direction = apply_inverses(inverses, gradient)
            basis = [direction] if self.previous is None else [direction, self.previous]
            v = np.stack(basis, axis=1)
            model = curvature + (self.tau + L2) * np.eye(len(g))
            a, b = v.T @ model @ v, -v.T @ g
            coefficients = np.linalg.solve(a, b)
            if self.previous is not None:
                second = np.clip(coefficients[1], -1, np.inf if agreed > 1 else 1)
                coefficients = np.array([(b[0] - second * a[0, 1]) / a[0, 0], second])
            step = v @ coefficients
            return step, g @ step + 0.5 * step @ model @ step, coefficients[1:]

        done = self.count - 1
        if done % s.refresh == 0 or done < s.refresh:
            self.gamma = self.tau if s.gamma is None else self.gamma
            self.inverses = self.invert(self.gamma)
        if s.gamma is not None and done > 0 and done % s.gamma_period == 0:
            factor = s.omega**s.gamma_period
            candidates = [self.gamma, self.gamma * factor, self.gamma / factor]
            self.gamma = min(candidates, key=lambda gamma: solve(self.invert(gamma))[1])
            self.inverses = self.invert(self.gamma)
        if s.momentum:
            last = np.zeros_like(g) if self.previous is None else self.previous
            curved = last @ (curvature + (self.tau + L2) * np.eye(len(g))) @ last
            self.evidence = 0.9 * self.evidence + 0.1 * np.array([-last @ g, curved])
            slope, curved = self.evidence
            self.agreement = 1 + slope / curved if curved else 1.0
        least, enough = s.agreement or (-np.inf, -np.inf)
        step, predicted, follows = solve(self.inverses)
        due, extrapolates = self.count % s.tau_period == 0, any(c < 0 or c > 1 for c in follows)
        if due or extrapolates or done == 0 or self.ratio < 0:
            before, after = OBJECTIVE(params, batch), OBJECTIVE(moved_by(params, step), batch)
            self.ratio = float(after - before) / predicted
            assert extrapolates or self.ratio >= -1  # no step is cut
            factor = s.omega**s.tau_period
            lowers, refused = due and self.ratio > s.high, extrapolates and self.ratio < 0
            raises = refused or (due and (self.ratio < s.low or self.agreement < least))
            self.judged += [self.agreement] if lowers else []
            self.tau *= factor if lowers and self.agreement > enough else 1
            self.tau /= factor if raises else 1
            self.checked += extrapolates and not due
            self.refused += refused
            step = 0 * step if refused else step
        if s.momentum:
            self.previous = step if step.any() else None
        return step

    def invert(self, gamma):
        inverse = self.settings.inverse
        return [block_inverse(*self.factors[name], gamma + L2, inverse) for name in LAYERS]


def apply_inverses(inverses: list[np.ndarray], gradient: Any) -> np.ndarray:
    parts = [as_matrix(gradient[name]).ravel() for name in LAYERS]
    return np.concatenate([inverse @ part for inverse, part in zip(inverses, parts, strict=True)])


def moved_by(params: Any, step: np.ndarray) -> Any:
    result, start = {}, 0
    for name in LAYERS:
        old = as_matrix(params[name])
        new = old + step[start : start + old.size].reshape(old.shape)
        result[name] = {"kernel": jnp.asarray(new[:-1]), "bias": jnp.asarray(new[-1])}
        start += old.size
    return result


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(inverse="eigen", momentum=False),
        Settings(low=5.0, high=5.0, gamma=0.05),  # no step is good enough: τ rises
        Settings(gamma=None, refresh=2),
        Settings(gamma=None, refresh=3, inverse="eigen"),
        Settings(agreement=None),
    ],
    ids=["factored, momentum", "eigen", "rising", "γ follows τ", "eigen, γ follows τ", "ρ alone"],
)
def test_recipe_equals_its_dense_reference(settings, x64):
    taus, gammas, reference = beside_reference(settings, make_params(jnp.float64), 8)
    assert len(set(taus)) > 1 and len(set(gammas)) > 1  # both did adapt
    disagree = settings.agreement is not None and min(reference.judged, default=1) < 0.5
    assert (max(taus) > settings.tau) == (settings.low == 5 or disagree)
    assert disagree == (settings.momentum and settings.agreement is not None and settings.low < 5)


def test_steps_that_extrapolate_are_refused_where_the_objective_rises(x64):
    settings = Settings(gamma=None, refresh=2, tau=1e-4, tau_period=7)
    saturated = jax.tree.map(lambda leaf: 6 * leaf, make_params(jnp.float64))
    taus, _, reference = beside_reference(settings, saturated, 20)
    assert reference.checked > reference.refused > 0  # some are taken
    assert max(taus) > settings.tau


def beside_reference(settings: Settings, params: Any, updates: int) -> Any:
    """Trains and compares every update; every τ and γ, and the reference."""
    batches = [make_batch(jnp.float64, s) for s in range(2)]
    tx, reference = settings.optimizer(params, batches[0]), Reference(settings)
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE, "kfra"))
    update, state = jax.jit(tx.update), tx.init(params)
    taus, gammas = [settings.tau], [settings.gamma]
    for k in range(updates):
        batch = batches[k % 2]
        (_, grads), curvature = curvature_fn(params, batch)
        step, state = update(grads, state, params, curvature=curvature)
        expected = reference.update(params, batch, grads, curvature.factors)
        assert_close(as_vector(step), expected, 1e-5)
        get = functools.partial(optax.tree_utils.tree_get, state)
        assert float(get("factor_damping")) == pytest.approx(reference.gamma, rel=1e-5)
        assert float(get("step_damping")) == pytest.approx(reference.tau, rel=1e-5)
        assert float(get("reduction_ratio")) == pytest.approx(reference.ratio, rel=1e-4)
        assert float(get("agreement")) == pytest.approx(reference.agreement, rel=1e-4)
        assert int(get("refused")) == reference.refused
        taus.append(reference.tau)
        gammas.append(reference.gamma)
        params = optax.apply_updates(params, step)
    return taus, gammas, reference


@pytest.mark.parametrize(("seed", "parts"), [(0, False), (1, False), (2, True)])
def test_where_there_is_no_curvature_steps_are_cut(seed, parts):
    """Behind the bend of a Huber loss; cubed outputs make the gradient large as well."""
    keys = jax.random.split(jax.random.key(seed), 3)
    batch = jax.random.normal(keys[0], (16, 4)), jax.random.normal(keys[1], (16, 2))
    w = 2 * jax.random.normal(keys[2], (4, 2))
    objective = kfgn.Objective(lambda w, x: (x @ w) ** 3, kfgn.losses.huber())
    optimizer, measured = kfgn.make(objective, w, batch)
    if parts:
        optimizer = optax.chain(
            kfgn.transforms.scale_by_kronecker(
                kfgn.layers.find_blocks(objective, w, batch), damping=0.1
            ),
            kfgn.transforms.scale_by_quadratic_model(damping=0.1, momentum=True),
            optax.scale_by_learning_rate(0.9),
        )

    @jax.jit
    def step(w, state):
        (value, grads), curvature = measured(w, batch)
        updates, state = optimizer.update(grads, state, w, curvature=curvature)
        return updates, state, value

    state, values = optimizer.init(w), []
    for k in range(8):
        updates, state, value = step(w, state)
        values.append(float(value))
        if k == 0:
            assert optax.tree.get(state, "reduction_ratio") < -1  # of the whole step
        w = optax.apply_updates(w, updates)
    assert max(values) == values[0] and values[-1] < 0.2 * values[0], values


@pytest.mark.parametrize("inverse", ["factored", "eigen"])
def test_direction_equals_the_dense_solve(inverse, x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    layers = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
    tx = kfgn.transforms.scale_by_kronecker(layers, 0.03, inverse=inverse)
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE, "kflr"))(params, batch)
    direction, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
    for name in LAYERS:
        q, g = (np.asarray(f) for f in curvature.factors[name])
        expected = block_inverse(q, g, 0.03, inverse) @ as_matrix(grads[name]).ravel()
        assert_close(as_matrix(direction[name]).ravel(), expected, 1e-11)


@pytest.mark.parametrize("momentum", [False, True])
def test_step_size_minimizes_the_dense_model_along_any_direction(momentum, x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))(params, batch)
    tx = kfgn.transforms.scale_by_quadratic_model(0.07, momentum=momentum)
    model = dense_gauss_newton(params, batch) + 0.07 * np.eye(len(as_vector(params)))
    state, basis = tx.init(params), []
    for seed in range(2):
        direction = make_params(jnp.float64, seed=10 + seed)
        updates, state = tx.update(direction, state, params, curvature=curvature)
        v = np.stack([as_vector(direction), *basis], axis=1)
        best = v @ np.linalg.solve(v.T @ model @ v, v.T @ as_vector(grads))
        assert_close(as_vector(updates), best, 1e-9)
        basis = [best] if momentum else []


@pytest.mark.parametrize(("inverse", "tolerance"), [("eigen", 1e-6), ("factored", 2e-3)])
@pytest.mark.parametrize("alias", ["kfra", "kflr"])
def test_one_step_solves_linear_least_squares(alias, inverse, tolerance, x64):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(40, INPUTS)), rng.normal(size=(40, CLASSES))
    params = {"kernel": jnp.asarray(rng.normal(size=(INPUTS, CLASSES))), "bias": jnp.ones(CLASSES)}
    objective = kfgn.Objective(
        lambda p, x: x @ p["kernel"] + p["bias"], kfgn.losses.half_squared_error
    )
    batch = (jnp.asarray(inputs), jnp.asarray(targets))
    tx = getattr(kfgn, alias)(
        objective,
        params,
        batch,
        learning_rate=1.0,
        factor_damping=1e-9,
        step_damping=kfgn.transforms.Fixed(0.0),
        inverse=inverse,
    )
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(objective, alias))(params, batch)
    updates, state = tx.update(grads, tx.init(params), params, curvature=curvature)
    padded = np.concatenate([inputs, np.ones((40, 1))], axis=1)
    newton = np.linalg.lstsq(padded, targets, rcond=None)[0] - as_matrix(params)
    assert_close(as_matrix(updates), newton, tolerance)
    assert float(optax.tree_utils.tree_get(state, "step_size")) == pytest.approx(1, abs=tolerance)


def test_inverses_are_refreshed_when_due():
    params = make_params()
    layers = kfgn.layers.find_blocks(OBJECTIVE, params, make_batch())
    tx = kfgn.transforms.scale_by_kronecker(layers, 0.1, refresh_inverse_every=3)
    curvature_fn = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))
    update, state, refreshed = jax.jit(tx.update), tx.init(params), []
    for k in range(8):
        (_, grads), curvature = curvature_fn(params, make_batch(seed=k))
        before = state.inverses
        _, state = update(grads, state, params, curvature=curvature)
        refreshed.append(bool(jnp.any(state.inverses["out"].left != before["out"].left)))
    # The first three always, then every third.
    assert refreshed == [True, True, True, True, False, False, True, False]


def test_unassigned_parameters_take_damped_gradient_steps():
    def scaled(params, inputs):
        return network(params, inputs) * jax.nn.softmax(params["scale"])  # no layer

    objective = kfgn.Objective(scaled, OBJECTIVE.loss, l2=L2)
    params, batch = {**make_params(), "scale": jnp.arange(0.0, CLASSES)}, make_batch()
    layers = kfgn.layers.find_blocks(objective, params, batch, unassigned="gradient")
    curvature_fn = kfgn.value_grad_and_curvature(objective, unassigned="gradient")
    (_, grads), curvature = jax.jit(curvature_fn)(params, batch)
    tx = kfgn.transforms.scale_by_kronecker(layers, 0.25)
    direction, _ = jax.jit(tx.update)(grads, tx.init(params), params, curvature=curvature)
    assert_close(direction["scale"], 4 * grads["scale"], 1e-6)


def test_unassigned_parameters_take_steps_by_their_diagonal():
    """The exact Gauss-Newton diagonal, damped; both kinds of inverse."""

    def scaled(params, inputs):
        return network(params, inputs) * jax.nn.softmax(params["scale"])  # no layer

    objective = kfgn.Objective(scaled, OBJECTIVE.loss, l2=L2)
    params, batch = {**make_params(), "scale": jnp.arange(0.0, CLASSES)}, make_batch()
    layers = kfgn.layers.find_blocks(objective, params, batch, unassigned="diagonal")
    curvature_fn = kfgn.value_grad_and_curvature(objective, unassigned="diagonal")
    (_, grads), curvature = jax.jit(curvature_fn)(params, batch)
    exact = kfgn.gauss_newton(objective).diagonal(params, batch)["scale"]
    assert_close(curvature.factors["scale"].diagonal, exact, 1e-5)
    for inverse in ("factored", "eigen"):
        tx = kfgn.transforms.scale_by_kronecker(layers, 0.25, inverse=inverse)
        direction, _ = jax.jit(tx.update)(grads, tx.init(params), params, curvature=curvature)
        assert_close(direction["scale"], grads["scale"] / (exact + 0.25), 1e-5)


# Broken numbers.


@functools.cache
def prepared(name: str) -> Any:
    """A transformation and its jitted update."""
    params, batch = make_params(), make_batch()
    layers = kfgn.layers.find_blocks(OBJECTIVE, params, batch)
    make = {
        "kfra": lambda: kfgn.kfra(OBJECTIVE, params, batch),
        "eigen": lambda: kfgn.kfra(OBJECTIVE, params, batch, inverse="eigen"),
        "scale_by_curvature": lambda: kfgn.transforms.scale_by_curvature(
            layers,
            factor_damping=kfgn.transforms.Greedy(1.0, 1e-4, 1e6, period=3),
            step_damping=kfgn.transforms.LevenbergMarquardt(1.0, 0.0, 1e6, period=1),
        ),
        "scale_by_kronecker": lambda: kfgn.transforms.scale_by_kronecker(layers, 0.1),
        "kronecker eigen": lambda: kfgn.transforms.scale_by_kronecker(layers, 0.1, inverse="eigen"),
    }
    tx = make[name]()
    return tx, jax.jit(tx.update)


@functools.cache
def curvature_fn() -> Any:
    return jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))


def change(tree: Any, layer: str, function: Any) -> Any:
    return {**tree, layer: function(tree[layer])}


def nan_inputs(params, batch):
    inputs, labels = batch
    (_, grads), curvature = curvature_fn()(params, (inputs.at[0, 0].set(jnp.nan), labels))
    return grads, curvature


def infinite_factor(params, batch):
    (_, grads), curvature = curvature_fn()(params, batch)
    factors = change(
        curvature.factors,
        "out",
        lambda f: f._replace(activation=f.activation.at[0, 0].set(jnp.inf)),
    )
    return grads, curvature.with_factors(factors)


def nan_gradient(params, batch):
    (_, grads), curvature = curvature_fn()(params, batch)
    return change(grads, "out", lambda g: {**g, "bias": g["bias"].at[0].set(jnp.nan)}), curvature


@pytest.mark.parametrize("broken", [nan_inputs, infinite_factor, nan_gradient])
@pytest.mark.parametrize(
    "name", ["kfra", "eigen", "scale_by_curvature", "scale_by_kronecker", "kronecker eigen"]
)
def test_broken_batch_changes_nothing_but_its_count(name, broken):
    tx, update = prepared(name)
    params, clean = make_params(), make_batch(seed=1)
    (_, grads), curvature = curvature_fn()(params, make_batch())
    _, state = update(grads, tx.init(params), params, curvature=curvature)

    bad_grads, bad_curvature = broken(params, clean)
    updates, after = update(bad_grads, state, params, curvature=bad_curvature)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(optax.tree_utils.tree_get(after, "skipped")) == 1
    assert_equal(without_skipped(after), without_skipped(state))

    (_, grads), curvature = curvature_fn()(params, clean)
    expected = update(grads, state, params, curvature=curvature)
    actual = update(grads, after, params, curvature=curvature)
    assert_equal(without_skipped(actual), without_skipped(expected))
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(actual[0]))


def without_skipped(tree: Any) -> Any:
    nothing = jnp.zeros((), jnp.int32)
    return optax.tree_utils.tree_set(tree, skipped=nothing, skipped_in_a_row=nothing)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": False}, {"factor_damping": 1.0}, kfgn.transforms.PRESETS["paper"]],
    ids=["default", "no momentum", "greedy", "paper"],
)
def test_gradient_of_zero_moves_nothing(options):
    """Three batches of four with nothing left to fit: no failure, so no damping changes."""
    objective = kfgn.Objective(lambda w, x: jnp.tanh(x @ w), kfgn.losses.half_squared_error)
    w, zeros = jnp.ones((3, 2)), jnp.zeros((3, 2))
    optimizer = kfgn.kfra(objective, w, (jnp.eye(3), zeros), **options)
    curvature_fn = kfgn.value_grad_and_curvature(objective)

    @jax.jit
    def update(w, state, inputs):
        (_, grads), curvature = curvature_fn(w, (inputs, zeros))
        return optimizer.update(grads, state, w, curvature=curvature)

    get = optax.tree_utils.tree_get
    state = optimizer.init(w)
    for k in range(24):
        before = state
        step, state = update(w, state, jnp.eye(3) if k % 4 == 0 else jnp.zeros((3, 3)))
        if k % 4:
            assert not np.any(step)
            assert get(state, "step_damping") == get(before, "step_damping")
        w = w + step
    assert int(get(state, "still")) == 18 and int(get(state, "skipped")) == 0
    assert np.all(w < 1)  # the other batches moved it


def test_direction_of_zero_stays_zero():
    """The quadratic model has no step size for it, and needs none."""
    params, batch = make_params(), make_batch()
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))(params, batch)
    tx = kfgn.transforms.scale_by_quadratic_model(0.1, momentum=True)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    updates, state = jax.jit(tx.update)(nothing, tx.init(params), params, curvature=curvature)
    assert int(state.skipped) == 0
    assert all(not np.any(u) for u in jax.tree.leaves(updates))


def test_broken_direction_is_skipped_by_the_quadratic_model():
    params = make_params()
    (_, grads), curvature = curvature_fn()(params, make_batch())
    tx = kfgn.transforms.scale_by_quadratic_model(0.1, momentum=True)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params, curvature=curvature)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    updates, after = update(broken, state, params, curvature=curvature)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_equal(without_skipped(after), without_skipped(state))
    assert int(after.skipped) == 1


@pytest.mark.parametrize("name", ["kfra", "scale_by_curvature"])
def test_failed_inversion_retreats_and_recovers(name):
    tx, update = prepared(name)
    params = make_params()
    (_, grads), curvature = curvature_fn()(params, make_batch())
    indefinite = jax.tree.map(lambda f: -1e3 * jnp.eye(len(f)), curvature.factors)
    updates, state = update(
        grads, tx.init(params), params, curvature=curvature.with_factors(indefinite)
    )
    get = functools.partial(optax.tree_utils.tree_get, state)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(get("skipped")) == 1
    start = {"kfra": 0.1, "scale_by_curvature": 1}[name]
    assert float(get("factor_damping")) == pytest.approx(10 * start)
    assert float(get("step_damping")) == pytest.approx(10 * start)
    # The next batch starts the averages afresh.
    updates, state = update(grads, state, params, curvature=curvature)
    assert_equal(optax.tree_utils.tree_get(state, "factors"), curvature.factors)
    assert all(jnp.all(jnp.isfinite(u)) and jnp.any(u != 0) for u in jax.tree.leaves(updates))


def test_step_into_infinity_is_refused():
    tx, update = prepared("scale_by_curvature")  # measures the new objective at every update
    params = make_params()
    (_, grads), curvature = curvature_fn()(params, make_batch())
    labels = make_batch()[1]
    nowhere = (jnp.full((len(labels), INPUTS), jnp.inf), labels)
    _, elsewhere = curvature_fn()(params, nowhere)
    curvature = curvature._replace(displaced=elsewhere.displaced)
    updates, state = update(grads, tx.init(params), params, curvature=curvature)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.skipped) == 1
    assert float(state.step_damping) == pytest.approx(10)


@pytest.mark.parametrize("dead", ["inputs", "out kernel", "hidden kernel", "everything"])
@pytest.mark.parametrize("name", ["kfra", "eigen"])
def test_singular_factors_train_on(name, dead):
    tx, _ = prepared(name)
    step = step_of(name)
    params, (inputs, labels) = make_params(), make_batch()
    for layer in LAYERS:
        if dead in (f"{layer} kernel", "everything"):
            params[layer]["kernel"] = jnp.zeros_like(params[layer]["kernel"])
    if dead in ("inputs", "everything"):
        inputs = jnp.zeros_like(inputs)
    (_, _), curvature = curvature_fn()(params, (inputs, labels))
    smallest = [jnp.linalg.eigvalsh(f)[0] for f in jax.tree.leaves(curvature.factors)]
    assert min(smallest) < 1e-6  # at least one factor is singular
    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state, (inputs, labels))
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0


@functools.cache
def step_of(name: str) -> Any:
    return jax.jit(make_step(prepared(name)[0]))


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_clip_by_curvature_bounds_the_dense_quadratic_form(bound, x64):
    params, batch = make_params(jnp.float64), make_batch(jnp.float64)
    tx = kfgn.transforms.clip_by_curvature(bound)
    (_, grads), curvature = curvature_fn()(params, batch)
    step, state = tx.update(grads, tx.init(params), params, curvature=curvature)
    matrix, before, after = dense_gauss_newton(params, batch), as_vector(grads), as_vector(step)
    curved = before @ matrix @ before
    assert float(state.curved) == pytest.approx(curved, rel=1e-6)  # a float32
    assert after @ matrix @ after == pytest.approx(min(curved, bound), rel=1e-6)
    assert int(state.clipped) == (bound < curved)
    np.testing.assert_allclose(after, before * np.sqrt(min(curved, bound) / curved), rtol=1e-6)


def test_clip_by_past_steps_bounds_by_the_mean_of_those_before():
    """Of ten at least; zeros and what is not finite count for nothing, and pass."""
    tx = kfgn.transforms.clip_by_past_steps(3.0, decay=0.9)
    state, lengths, total, clipped = tx.init(jnp.zeros(2)), [1.0, 2.0] * 5 + [50.0, 4.0, 7.0], 0, 0
    for k, length in enumerate(lengths):
        for nothing in (jnp.zeros(2), jnp.array([jnp.nan, 1.0])):
            same, state = tx.update(nothing, state)
            np.testing.assert_array_equal(same, nothing)
        step, state = tx.update(jnp.array([0.6, 0.8]) * length, state)
        mean = total / (1 - 0.9**k) if k else np.inf
        expected = min(length, 3 * mean) if k >= 10 else length
        np.testing.assert_allclose(step, np.array([0.6, 0.8]) * expected, rtol=1e-5)
        total, clipped = 0.9 * total + 0.1 * expected, clipped + (expected < length)
    assert int(state.clipped) == clipped == 2 and int(state.count) == len(lengths)
    huge, _ = tx.update(jnp.array([0.6, 0.8]) * 1e30, state)  # its square is no float32
    np.testing.assert_allclose(
        huge, 3 * total / (1 - 0.9 ** len(lengths)) * np.array([0.6, 0.8]), rtol=1e-5
    )
    with pytest.raises(kfgn.errors.OptionError, match="factor"):
        kfgn.transforms.clip_by_past_steps(0.0)


def test_a_classifier_that_fits_its_training_set_stays_there():
    """By ρ alone the damping falls until steps of one batch undo what the others taught."""
    size, examples, updates = 16, 128, 400
    inputs = jax.random.normal(jax.random.key(0), (4, examples, 8))
    noise = jax.random.normal(jax.random.key(1), (4, examples, 3))
    labels = jnp.argmax(inputs[..., :3] + noise, axis=-1)

    def model(params, x):
        return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]

    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(model, loss)
    shapes = (8, 24), (24, 24), (24, 3)

    def values(seed, inputs, labels):
        keys = jax.random.split(seed, 4)
        pairs = zip(keys[1:], shapes, strict=True)
        params = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in pairs]
        first = inputs[:size], labels[:size]
        optimizer, curvature_fn = kfgn.make(objective, params, first, method="kflr")

        def step(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (size,), 0, examples)
            (_, grads), curvature = curvature_fn(params, (inputs[chosen], labels[chosen]))
            updates, state = optimizer.update(grads, state, params, curvature=curvature)
            params = optax.apply_updates(params, updates)
            return (params, state), objective(params, (inputs, labels))

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, jax.random.split(keys[0], updates))[1]

    found = jax.jit(jax.vmap(values))(jax.random.split(jax.random.key(2), 4), inputs, labels)
    assert np.all(found[:, 0] > 0.5)
    assert np.max(found[:, 200:]) < 0.1
    assert np.max(found[:, -1]) < 0.01
