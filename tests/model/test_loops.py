"""Loops that stay loops: the factors of the unrolled model, from a program that does not grow."""

import io
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.curvature.methods.kflr import KFLR
from kfgn.model.graph.build_graph import build_graph
from tests.tables.comparison import close

pytestmark = pytest.mark.usefixtures("x64")

N, T, D = 4, 5, 3


def normal(*shape: int) -> np.ndarray:
    return 0.5 * np.random.default_rng(sum(shape)).normal(size=shape)


def states(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros((x.shape[0], D), x.dtype)


def cell(p, x, **options):
    def step(h, v):
        h = jnp.tanh(h @ p["w"] + v @ p["u"] + p["b"])
        return h, h

    return jax.lax.scan(step, zeros(x), states(x), **options)


def early(p, x):
    """The last state goes nowhere: its product is no use."""
    rows = jax.lax.scan(lambda h, v: (jnp.tanh(h @ p["w"] + v), h), zeros(x), states(x), reverse=1)
    return jnp.mean(rows[1], 0) @ p["o"]


def tied(p, x):
    """A kernel outside of the loop, in it, and in it transposed."""
    step = lambda h, v: (jnp.tanh(jnp.tanh(h @ p["w"] + v) @ (2 * p["w"]).T), None)  # noqa: E731
    return jax.lax.scan(step, zeros(x), states(x))[0] @ p["w"] @ p["o"]


def stacks(p, x):
    """Several kernels of a stack at a time, in another order than the parameter's."""

    def step(h, slices):
        v, w, table, b = slices
        h = jnp.tanh(h @ w[0] + b)
        return jnp.tanh(h @ w[1] + table[jnp.int32(v[:, 0] > 0)]), None

    rows = states(x), p["w"][::-1], p["table"], p["b"]
    return jax.lax.scan(step, x[:, 0], rows)[0] @ p["o"]


def nested(p, x):
    """Loops over layers and over time, one in the other, with rematerialization and jit."""

    def layer(rows, kernels):
        w, u = kernels
        step = jax.jit(lambda h, v: (jnp.tanh(h @ w + v @ u + p["b"]),) * 2)
        return jax.lax.scan(jax.checkpoint(step), zeros(x), rows, reverse=True)[1], None

    return jnp.mean(jax.lax.scan(layer, states(x), (p["w"], p["u"]))[0], 0) @ p["o"]


def added(p, x):
    """A row that is added at each step, a scale of each, and a number per step."""

    def step(_, c):
        h, row, scale = c[0], c[1], c[2]
        return jnp.tanh(h * scale + row) * 0.9, row, scale

    h, _, _ = jax.lax.fori_loop(0, T, step, (x[:, 0], p["b"], p["s"]))
    h, _ = jax.lax.scan(lambda h, q: (jnp.tanh(q * h), None), h, p["q"])
    return h @ p["o"]


def made(p, x):
    """Kernels joined, masked and scaled, in the loop and before it; a stack, plus a constant."""
    whole, mask = jnp.concatenate([p["w"], p["u"]]), np.tril(np.ones((D, D)))

    def step(h, rows):
        v, k = rows
        h = jnp.tanh(jnp.concatenate([h, v], -1) @ (whole / jnp.sqrt(3.0)))
        return jnp.tanh(h @ (p["m"] * mask) @ (k / 2 + mask)), None

    return jax.lax.scan(step, zeros(x), (states(x), p["k"]))[0] @ p["o"]


def mapped(p, x):
    h = jax.lax.map(lambda v: jnp.tanh(v @ p["w"] + p["b"]), states(x), batch_size=2)
    return jnp.mean(h, 0) @ p["o"]


def regions(p, x):
    """Rematerialized outside of loops, around one, inside of one, and one in the other."""
    region = lambda h, v: jnp.tanh(h @ p["w"] + v @ p["u"] + p["b"])  # noqa: E731
    cell, keep = jax.checkpoint(region), jax.checkpoint_policies.dots_saveable
    step = lambda h, k: (jnp.tanh(cell(h, h) @ k), None)  # noqa: E731
    layers = jax.checkpoint(lambda h: jax.lax.scan(step, h, p["k"])[0], policy=keep)
    return layers(cell(cell(zeros(x), x[:, 0]), x[:, 1])) @ p["o"]


def numbered(p, x):
    """Slices by the iteration's number: up, down, by two, and from an axis inside of a region."""

    @jax.checkpoint
    def region(h, t):
        return jnp.tanh(h @ jnp.take(p["u"], t, axis=1)) * (1 + t.astype(h.dtype)), None

    def step(state, _):
        h, t = state
        return (jnp.tanh(h @ p["k"][t]), t + 2), None

    h = jax.lax.fori_loop(0, T, lambda t, h: jnp.tanh(h @ p["w"][t] + p["b"][T - 1 - t]), x[:, 0])
    h = jax.lax.scan(region, h, jnp.arange(T), reverse=True)[0]
    return jax.lax.scan(step, (h, 1), None, length=2)[0][0] @ p["o"]


def numbered_twice(p, x):
    """The slice of a slice, in a loop inside of another."""

    def outer(i, h):
        own = {n: p[n][i] for n in ("w", "b")}
        step = lambda j, h: jnp.tanh(h @ own["w"][j] + own["b"])  # noqa: E731
        return jax.lax.fori_loop(0, 2, step, h)

    return jax.checkpoint(lambda h: jax.lax.fori_loop(0, T, outer, h))(x[:, 0]) @ p["o"]


W = {"w": normal(D, D), "o": normal(D, 2)}
CELL = W | {"u": normal(D, D), "b": normal(D)}
MODELS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "unroll": (lambda p, x: cell(p, x, unroll=2)[0] @ p["o"], CELL),
    "early": (early, W),
    "tied": (tied, W),
    "stacks": (
        stacks,
        W | {"w": normal(T, 2, D, D), "table": normal(T, 2, D), "b": normal(T, D)},
    ),
    "nested": (nested, W | {"w": normal(2, D, D), "u": normal(2, D, D), "b": normal(D)}),
    "added": (added, {"b": normal(D), "s": normal(D), "q": normal(4), "o": normal(D, 2)}),
    "made": (made, W | {"u": normal(D, D), "m": normal(D, D), "k": normal(T, D, D)}),
    "mapped": (mapped, W | {"b": normal(D)}),
    "regions": (regions, CELL | {"k": normal(T, D, D)}),
    "numbered": (
        numbered,
        W | {"w": normal(T, D, D), "b": normal(T, D), "u": normal(D, T, D), "k": normal(4, D, D)},
    ),
    "numbered twice": (numbered_twice, W | {"w": normal(T, 2, D, D), "b": normal(T, D)}),
}
BATCH = normal(N, T, D), normal(N, 2)


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(close, found, expected)


def objective_of(model: Callable) -> kfgn.Objective:
    return kfgn.Objective(model, kfgn.losses.half_squared_error)


def unrolled(curvature_fn: Callable, params: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KFLR, "walks", True)
        return jax.jit(curvature_fn)(params, BATCH)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_the_unrolled_model(name, sharing):
    model, params = MODELS[name]
    objective = objective_of(model)
    assert build_graph(objective, params, BATCH[0]).model.loops
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr", sharing=sharing)
    (value, grads), curvature = jax.jit(curvature_fn)(params, BATCH)
    (expected, _), other = unrolled(curvature_fn, params)
    assert_close((value, grads), jax.value_and_grad(objective)(params, BATCH))
    assert_close(value, expected)
    assert_close(curvature.factors, other.factors)
    direction = {n: jnp.ones_like(x) for n, x in params.items()}
    assert_close(curvature.linearized(direction), other.linearized(direction))


def by_layer(p, x):
    h = x[:, 0]
    for w in p["w"]:
        h = jnp.tanh(h @ w)
    return h @ p["o"]


def layers(p, x):
    """Backwards through the stack."""
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x[:, 0], p["w"][::-1])[0] @ p["o"]


def test_a_stack_that_another_term_uses_layer_by_layer():
    params, batches = W | {"w": normal(T, D, D)}, {"loop": BATCH, "layers": BATCH}
    terms = {"loop": objective_of(layers), "layers": objective_of(by_layer)}
    found, expected = (
        jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batches)[1].factors
        for objective in (
            kfgn.sum_of(terms),
            kfgn.sum_of(
                terms | {"loop": objective_of(lambda p, x: by_layer(p | {"w": p["w"][::-1]}, x))}
            ),
        )
    )
    assert_close(found, expected)


def test_kernels_that_only_an_unrolled_loop_has():
    """Functions of the entries of slices: the loop is unrolled, as if it had been asked for."""

    def model(p, x):
        return layers(p | {"w": jnp.tanh(p["w"])}, x)

    objective, params = objective_of(model), W | {"w": normal(T, D, D)}
    graph = build_graph(objective, params, BATCH[0])
    assert not graph.model.loops and not graph.reasons


def test_an_iteration_without_the_kernel():
    """A kernel times zero is none; one with another number each time has a block of its own."""

    def model(p, x):
        step = lambda k, h: jnp.tanh(h @ (p["w"] * (0.1 * k)) + 0.1)  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x[:, 0]) @ p["o"]

    curvature_fn = kfgn.value_grad_and_curvature(objective_of(model), "kflr")
    found, expected = jax.jit(curvature_fn)(W, BATCH), unrolled(curvature_fn, W)
    assert_close(found[1].factors, expected[1].factors)
    assert found[1].factors["w"].pre_activation.shape == (D * D, D * D)


@pytest.mark.parametrize("name", ["stacks", "nested"])
def test_blocks_are_found_as_in_the_unrolled_model(name):
    """What the optimizer knows of a stack is what the exact blocks say."""
    model, params = MODELS[name]
    operator = kfgn.gauss_newton(objective_of(model))
    layers = kfgn.layers.find_blocks(operator.objective, params, BATCH).layers
    blocks, products = (f(params, BATCH) for f in (operator.blocks, operator.block_matvecs))
    for key, layer in layers.items():
        matrix = layer.to_matrix(params)
        assert_close(layer.from_matrix(matrix), {n: params[n] for n in layer.parameters})
        own = blocks[key].reshape(-1, *blocks[key].shape[-2:])
        expected = jnp.einsum("sij,sj->si", own, matrix.reshape(len(own), -1))
        assert_close(products[key](matrix), expected.reshape(matrix.shape))


@pytest.mark.parametrize("inside", [False, True])
def test_a_bias_beyond_the_border_of_a_region(inside):
    """It is of the same layer as its kernel, rematerialized or not."""

    def model(p, x):
        if inside:
            return jax.checkpoint(lambda h: jnp.tanh(h + p["b"]))(x[:, 0] @ p["w"]) @ p["o"]
        h = jax.checkpoint(lambda h: jnp.sin(h) @ p["w"])(x[:, 0])
        return jnp.tanh(h[:, None] + p["b"])[:, 0] @ p["o"]

    graph = build_graph(objective_of(model), W | {"b": normal(D)}, BATCH[0])
    assert [layer.parameters for layer in graph.layers.values()] == [("w", "b"), ("o",)]


def test_what_a_derivative_by_inputs_rematerializes_is_one_use():
    """The forward pass that its region repeats meets the kernel once."""

    def uses(wrap: Callable) -> list[int]:
        def model(p, x):
            layer = wrap(lambda h: jnp.tanh(h @ p["w"]))
            return jax.vmap(jax.grad(lambda v: jnp.sin(layer(v) @ p["w"])[0]))(x[:, 0]) @ p["o"]

        graph = build_graph(objective_of(model), W, BATCH[0])
        return [len(layer.uses) for layer in graph.layers.values()]

    assert uses(jax.checkpoint) == uses(lambda layer: layer) == [4, 1]


def test_what_is_rematerialized_is_not_kept():
    """But for what layers read, and the gradients at their results."""

    def temporary(wrap: Callable) -> int:
        def layer(h, w):
            h = h @ w
            for _ in range(8):
                h = jnp.sin(h * h)
            return h, None

        def model(p, x):
            return jax.lax.scan(wrap(layer), x, p["w"])[0] @ p["o"]

        def step(params, batch):
            (_, grads), curvature = curvature_fn(params, batch)
            return grads, curvature.factors["w"].activation, curvature.factors["w"].pre_activation

        curvature_fn = kfgn.value_grad_and_curvature(objective_of(model), "kflr")
        batch = normal(256, D), normal(256, 2)
        compiled = jax.jit(step).lower(W | {"w": normal(12, D, D)}, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(jax.checkpoint) < 0.6 * temporary(lambda layer: layer)


def test_what_data_freezes_stays_frozen():
    """As a branch for each example guards its parameters, but it is none."""

    def model(p, x):
        def one(x):
            held = jnp.where(jnp.int32(x[0] > 0) == 1, p["w"], jax.lax.stop_gradient(p["w"]))
            return jnp.tanh(x @ held) @ p["o"]

        return jax.vmap(one)(x[:, 0])

    objective = objective_of(model)
    assert list(build_graph(objective, W, BATCH[0]).reasons) == ["w"]
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kflr", unassigned="gradient")
    assert_close(jax.jit(curvature_fn)(W, BATCH)[0], jax.value_and_grad(objective)(W, BATCH))


def test_a_learned_first_state():
    """It has no block, and the layers of its loop have theirs, unrolled or not."""

    def model(p, x):
        start = jnp.broadcast_to(p["start"], (x.shape[0], D))
        return jax.lax.scan(lambda h, v: (jnp.tanh(h @ p["w"] + v), None), start, states(x))[0]

    objective, params = objective_of(model), {"w": W["w"], "start": normal(D)}
    graphs = [build_graph(objective, params, BATCH[0], unroll=unroll) for unroll in (False, True)]
    assert graphs[0].reasons == graphs[1].reasons
    assert "first state of a loop" in graphs[0].reasons["start"]
    assert [list(graph.layers) for graph in graphs] == [["w"], ["w"]]


def equations(jaxpr: jex.Jaxpr) -> int:
    found = len(jaxpr.eqns)
    for value in (x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values()))):
        body = getattr(value, "jaxpr", value)
        found += equations(body) if isinstance(body, jex.Jaxpr) else 0
    return found


def test_the_program_does_not_grow():
    """With the number of time steps and of layers, hence neither does the time to compile it."""

    def model(p, x):
        h = cell(p, x)[1]
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, h[-1], p["layers"])[0] @ p["o"]

    def size(length: int) -> int:
        params = CELL | {"layers": normal(length, D, D)}
        batch = normal(N, length, D), normal(N, 2)
        objective = objective_of(model)
        optimizer = kfgn.kfac(objective, params, batch)
        curvature_fn = kfgn.value_grad_and_curvature(objective, "kfac")

        def step(params, state, key):
            (_, grads), curvature = curvature_fn(params, batch, key=key)
            return optimizer.update(grads, state, params, curvature=curvature)

        arguments = params, optimizer.init(params), jax.random.key(0)
        return equations(jax.make_jaxpr(step)(*arguments).jaxpr)

    assert size(300) == size(3) > 100


def test_a_loop_too_long_to_unroll():
    """What walks through every value refuses it, and names what does not."""
    objective, params = objective_of(lambda p, x: cell(p, x)[0] @ p["o"]), CELL
    batch = normal(2, 3000, D), normal(2, 2)
    for function in (
        kfgn.value_grad_and_curvature(objective, "kfra"),
        kfgn.hessian(objective).blocks,
    ):
        with pytest.raises(kfgn.errors.LoopError, match="3000 iterations") as error:
            function(params, batch)
        assert '"kfac", "kflr" and "empirical", and matvec' in str(error.value)
    for method in ("kflr", "empirical"):
        jax.eval_shape(kfgn.value_grad_and_curvature(objective, method), params, batch)
    jax.eval_shape(kfgn.hessian(objective).matvec, params, batch, params)
    found = kfgn.inspect(objective, params, batch, file=io.StringIO())
    assert not found.totals.feasible
    assert "kfra: has loops" in str(found)


def test_a_kernel_made_inside_of_a_loop_too_long_to_unroll():
    """The reason says what helps, and that does."""

    def model(before):
        def run(p, x):
            kernel = jnp.tanh(p["w"])

            def step(h, v):
                return jnp.sin(h @ (kernel if before else jnp.tanh(p["w"])) + v), None

            return jax.lax.scan(step, zeros(x), states(x))[0] @ p["o"]

        return objective_of(run)

    found, helped = (build_graph(model(before), W, normal(2, 3000, D)) for before in (False, True))
    assert "inside of a loop of 3000 iterations" in found.reasons["w"]
    assert "made before the loop" in found.reasons["w"]
    assert helped.model.loops and not helped.reasons


def test_a_choice_that_protects_a_root_keeps_its_guard(x64):
    """The derivatives of a branch that is not taken, which are NaN, stay out of the gradient."""

    def model(w, x):
        def one(x):
            safe = jnp.all(x @ jax.lax.stop_gradient(w) > 0)
            return jax.lax.cond(safe, lambda: jnp.sqrt(x @ w), lambda: x @ w)

        return jax.vmap(one)(x)

    x = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]])
    w, batch = jnp.array([[1.0, 0.2], [0.3, 1.0]]), (x, jnp.ones((3, 2)))
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    (_, gradient), curvature = kfgn.value_grad_and_curvature(objective, "kflr")(w, batch)
    expected = jax.grad(objective)(w, batch)
    assert jnp.all(jnp.isfinite(expected))
    np.testing.assert_allclose(gradient, expected, rtol=1e-14)
    # A parameter in no layer has its own exact block.
    jacobian = jax.jacobian(model)(w, x).reshape(6, 4)
    (factors,) = curvature.factors.values()
    np.testing.assert_allclose(factors.pre_activation, jacobian.T @ jacobian / 3, rtol=1e-13)
