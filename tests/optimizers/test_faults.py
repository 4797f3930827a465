"""What goes wrong in long trainings: one compiled step sees it all, and goes on."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from tests.tables.small import assert_equal

get = optax.tree_utils.tree_get
SETTINGS = {"float32": {}, "float64": {"inverse": "eigen", "factor_damping": 1.0}}
BOUNDS = (1e-9, 1e6)  # of both dampings


class Run(NamedTuple):
    params: Any
    state: Any
    batch: Any  # inputs, targets, weights


class Trained(NamedTuple):
    """A compiled step that donates what it is given, and a few updates made by it."""

    step: Callable[..., Any]
    new: Run
    clean: Run


def model(params, inputs):
    hidden = jax.nn.relu(inputs @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


OBJECTIVE = kfgn.Objective(model, kfgn.losses.half_squared_error)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def make_step(dtype, **options):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / len(shape), dtype)

    a, b = ({"kernel": normal(d, e), "bias": normal(e)} for d, e in ((4, 6), (6, 3)))
    params, inputs = {"a": a, "b": b}, normal(8, 4)
    batch = inputs, jnp.sin(inputs[:, :3]), jnp.ones(8, dtype)
    optimizer = kfgn.kfra(OBJECTIVE, params, batch, **options)
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        (value, grads), curvature = curvature_fn(params, batch)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    return step, Run(params, optimizer.init(params), batch)


def advance(step, run, updates):
    """The run after so many updates, and its losses before each."""
    params, state, losses = *copied(run[:2]), []
    for _ in range(updates):
        params, state, value = step(params, state, run.batch)
        losses.append(float(value))
    return run._replace(params=params, state=state), losses


@pytest.fixture(params=SETTINGS)
def trained(request):
    with jax.enable_x64(request.param == "float64"):
        yield _trained(request.param)


@functools.cache
def _trained(dtype: str) -> Trained:
    step, new = make_step(dtype, **SETTINGS[dtype])
    return Trained(step, new, advance(step, new, 5)[0])


def example(**change):
    """A change of one example."""

    def fault(run):
        names = dict(zip(("inputs", "targets", "weights"), run.batch, strict=True))
        for name, value in change.items():
            names[name] = names[name].at[1].set(value)
        return run._replace(batch=tuple(names.values()))

    return fault


def of_params(change):
    return lambda run: run._replace(params=change(run.params))


def of_state(**change):
    """A change of the state, at an update that inverts."""
    change["count"] = 10

    def fault(run):
        new = {
            n: jax.tree.map(lambda old, x: jnp.asarray(x, old.dtype), get(run.state, n), x)
            for n, x in change.items()
        }
        return run._replace(state=optax.tree_utils.tree_set(run.state, **new))

    return fault


def indefinite(run):
    """Factors with eigenvalues at zero and, by rounding, below."""

    def rounded(f):
        one = jnp.ones(f.shape, f.dtype)
        return one - 4 * len(f) * jnp.finfo(f.dtype).eps * jnp.eye(len(f), dtype=f.dtype)

    factors = jax.tree.map(rounded, get(run.state, "factors"))
    assert all(np.linalg.eigvalsh(f)[0] < 0 for f in jax.tree.leaves(factors))
    return of_state(factors=factors)(run)


FAULTS = {
    "NaN input": example(inputs=jnp.nan),
    "infinite input": example(inputs=-jnp.inf),
    "NaN target": example(targets=jnp.nan),
    "infinite target": example(targets=jnp.inf),
    "loss beyond numbers": of_params(
        lambda p: jax.tree.map(lambda x: x * float(jnp.finfo(x.dtype).max) ** 0.6, p)
    ),
    "loss exploded": of_params(lambda p: jax.tree.map(lambda x: x * 1e3, p)),
    "dead layer": of_params(lambda p: p | {"a": {**p["a"], "bias": p["a"]["bias"] - 1e3}}),
    "zero parameters": of_params(lambda p: jax.tree.map(jnp.zeros_like, p)),
    "zero inputs": lambda run: run._replace(batch=(run.batch[0] * 0, *run.batch[1:])),
    "identical": lambda run: run._replace(
        batch=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), run.batch)
    ),
    "one example": lambda run: run._replace(batch=(*run.batch[:2], jnp.eye(8)[0] * run.batch[2])),
    "no weights": lambda run: run._replace(batch=(*run.batch[:2], run.batch[2] * 0)),
    "indefinite": indefinite,
    "dampings least": of_state(step_damping=BOUNDS[0], factor_damping=BOUNDS[0]),
    "dampings most": of_state(step_damping=BOUNDS[1], factor_damping=BOUNDS[1]),
}
SKIPPED = {"NaN input", "infinite input", "NaN target", "infinite target", "loss beyond numbers"}


@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on(trained, name):
    """What cannot be used changes nothing but its count; what can, moves; then all goes on."""
    faulty = FAULTS[name](trained.clean)
    after, _ = advance(trained.step, faulty, 1)
    still = {"skipped": int(name in SKIPPED), "still": int(name == "no weights")}
    found = {n: int(get(after.state, n)) - int(get(faulty.state, n)) for n in still}
    assert found == still
    if any(still.values()):
        assert_equal(after.params, faulty.params)
        assert_equal(get(after.state, "factors"), get(faulty.state, "factors"))
        assert_equal(get(after.state, "inverses"), get(faulty.state, "inverses"))
    if name == "loss beyond numbers":
        return  # which no step could leave
    # On the batch as it was, except where there is no way back.
    batch = faulty.batch if name in ("identical", "one example") else trained.clean.batch
    end, losses = advance(trained.step, after._replace(batch=batch), 12)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((end.params, end.state)))
    for damping in ("step_damping", "factor_damping"):
        assert BOUNDS[0] * 0.999 <= float(get(end.state, damping)) <= BOUNDS[1]


@pytest.mark.parametrize("scale", [1e-15, 1e-7, 1e4, 1e15])
def test_data_of_any_scale(trained, scale):
    """Inputs and targets: the loss falls, and no number of the state leaves its range."""
    inputs, targets, weights = trained.new.batch
    run = trained.new._replace(batch=(inputs * scale, targets * scale, weights))
    end, losses = advance(trained.step, run, 12)
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert int(get(end.state, "skipped")) == 0
    numbers = kfgn.diagnostics.record(end.state)
    infinite = {n for n, value in numbers.items() if not np.all(np.isfinite(value))}
    # Sums of squares; the metrics are float32, whatever else is.
    assert infinite <= ({"gradient_norm"} if scale > 1e9 else set())


@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0])
def test_a_saturated_classifier_does_not_get_worse(scale):
    """Its model has next to no curvature and promises more than there is to gain."""
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(lambda w, x: x @ w, loss, l2=0.01)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr")
    shapes = jnp.ones((3, 3)), (jnp.ones((6, 3)), jnp.zeros(6, int))
    optimizer = kfgn.kflr(objective, *shapes, momentum=False)

    @jax.jit
    def step(w, state, batch):
        (value, grads), curvature = curvature_fn(w, batch)
        updates, state = optimizer.update(grads, state, w, curvature=curvature)
        return optax.apply_updates(w, updates), state, value

    for seed in range(12):
        rng = np.random.default_rng(seed)
        inputs, labels = rng.normal(size=(6, 3)) * scale, rng.integers(0, 3, 6)
        batch = jnp.asarray(inputs, jnp.float32), jnp.asarray(labels)
        w, losses = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32), []
        state = optimizer.init(w)
        for _ in range(8):
            w, state, value = step(w, state, batch)
            losses.append(float(value))
        assert max(losses) < 1.1 * losses[0]  # by 8, 24 and 36 times, were only some measured


def test_a_run_compiles_once(trained):
    """Faults, refreshes and all: one program; a last batch of one row is one more."""
    step, run = trained.step, trained.clean
    before = step._cache_size()
    advance(step, run, 12)
    assert step._cache_size() == before
    for _ in range(2):
        last, losses = advance(
            step, run._replace(batch=jax.tree.map(lambda x: x[:1], run.batch)), 2
        )
        assert losses[1] < losses[0]
        advance(step, last._replace(batch=run.batch), 1)
    assert step._cache_size() == before + 1


def test_nothing_goes_to_the_host_and_nothing_stays(trained):
    """Inside 2,000 updates no transfer, and after them the arrays of one."""
    (params, state), batch = copied(trained.clean[:2]), trained.clean.batch
    alive, resident = [], []
    with jax.transfer_guard("disallow"):
        for k in range(2000):
            params, state, _ = trained.step(params, state, batch)
            if k % 975 == 49:
                alive.append((len(jax.live_arrays()), sum(x.nbytes for x in jax.live_arrays())))
                resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # Fewer where what other tests had made was let go meanwhile; an update's would be thousands.
    assert alive[2] <= alive[0]
    assert resident[2] - resident[0] < 2**12  # KiB, where an update's arrays are of 3 KiB


def test_donated_buffers_are_all_reused(trained):
    """Params and state are written where they were: nothing of them is held twice."""
    given = trained.clean
    memory = trained.step.lower(*given).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(given[:2]))


def test_factors_stay_symmetric():
    """Over 10,000 updates; and semi-definite, as far as float32 says."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(7, 5, 2)), jnp.float32)
    objective = kfgn.Objective(lambda w, x: jnp.tanh(x @ w), kfgn.losses.half_squared_error)
    targets = jnp.full((5, 3), 0.5)
    optimizer = kfgn.kfra(objective, w, (inputs[0], targets))
    curvature_fn = kfgn.value_grad_and_curvature(objective)

    def update(carry, k):
        w, state = carry
        (value, grads), curvature = curvature_fn(w, (inputs[k % 7], targets))
        updates, state = optimizer.update(grads, state, w, curvature=curvature)
        return (w + updates, state), value

    run = jax.jit(lambda w: jax.lax.scan(update, (w, optimizer.init(w)), jnp.arange(10_000)))
    (w, state), losses = run(w)
    assert np.isfinite(losses).all() and int(get(state, "skipped")) == 0
    for matrix in jax.tree.leaves((get(state, "factors"), get(state, "inverses"))):
        # One roundoff in each average: the sum over all is at most 1 / (1 - decay) of them.
        matrix = np.asarray(matrix)
        assert np.abs(matrix - matrix.T).max() <= 1e-6 * np.abs(matrix).max()
        assert np.linalg.eigvalsh(matrix)[0] >= -1e-6 * np.abs(matrix).max()


@pytest.mark.parametrize("jit", [False, True])
def test_an_empty_batch_is_an_error(jit):
    _, run = make_step("float32")
    function = kfgn.value_grad_and_curvature(OBJECTIVE)
    empty = jax.tree.map(lambda x: x[:0], run.batch)
    with pytest.raises(kfgn.errors.BatchError, match="empty: expected at least one"):
        (jax.jit(function) if jit else function)(run.params, empty)
