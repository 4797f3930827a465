"""Sums of objectives: the truth is `jax.grad` and `jax.hessian` of the user's own sum."""

from __future__ import annotations

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import kfgn

LOSS = kfgn.losses.half_squared_error


def net(params, x):
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    h = jnp.tanh(h @ params["b"]["w"] + params["b"]["b"])
    return h @ params["c"]["w"] + params["c"]["b"]


def laplacian(params, x):
    """`u_xx + u_yy`, which does not see the last bias, and the kernels at derivatives, too."""

    def at(z):
        def second(direction):
            def slope(t):
                return jax.jvp(lambda s: net(params, s)[0], (t,), (direction,))[1]

            return jax.jvp(slope, (z,), (direction,))[1]

        return second(jnp.array([1.0, 0.0], z.dtype)) + second(jnp.array([0.0, 1.0], z.dtype))

    return jax.vmap(at)(x)[:, None]


@functools.partial(jax.jit, static_argnames="width")
def start(width=5):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (2, width), "b": (width, width), "c": (width, 1)}
    return {
        n: {"w": jax.random.normal(k, s) * s[0] ** -0.5, "b": jnp.full(s[1], 0.1)}
        for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


@functools.partial(jax.jit, static_argnames=("interior", "boundary"))
def poisson(interior=12, boundary=8):
    """`-Δu = 2 π² sin πx sin πy` in the unit square, u = 0 on its edge."""
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.uniform(keys[0], (interior, 2))
    right = -2 * np.pi**2 * jnp.prod(jnp.sin(np.pi * x), axis=1, keepdims=True)
    t, side = jax.random.uniform(keys[1], (boundary,)), jnp.arange(boundary) % 4
    end = jnp.asarray(side % 2, t.dtype)
    edge = jnp.where(side[:, None] < 2, jnp.stack([t, end], 1), jnp.stack([end, t], 1))
    return {"interior": (x, right), "boundary": (edge, jnp.zeros((boundary, 1)))}


def summed(l2=0.02):
    return kfgn.sum_of(
        {
            "interior": kfgn.Objective(laplacian, LOSS, l2=l2),
            "boundary": kfgn.Objective(net, LOSS),
        },
        weights={"boundary": 10.0},
    )


def truth(params, batch, l2=0.02):
    """The user's own sum."""
    (x, right), (edge, values) = batch["interior"], batch["boundary"]
    inside = 0.5 * jnp.mean(jnp.sum((laplacian(params, x) - right) ** 2, axis=1))
    outside = 0.5 * jnp.mean(jnp.sum((net(params, edge) - values) ** 2, axis=1))
    return inside + 10 * outside + l2 / 2 * optax.tree.norm(params, squared=True)


def close(found, expected, rtol=1e-11, atol=1e-11):
    """A few roundoffs; values are of size 100."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


@pytest.mark.usefixtures("x64")
def test_value_gradient_and_exact_matrices_add():
    params, batch, objective = start(), poisson(), summed()
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def expected(flat):
        def f(p):
            return truth(unravel(p), batch)

        curved = jnp.zeros((flat.size, flat.size))
        for model, name, weight in ((laplacian, "interior", 1.0), (net, "boundary", 10.0)):
            x = batch[name][0]
            jacobian = jax.jacobian(lambda p, m=model, x=x: m(unravel(p), x)[:, 0])(flat)
            curved += weight * jacobian.T @ jacobian / len(x)
        vector = jnp.cos(flat)
        matrices = jax.hessian(f)(flat), curved
        return *jax.value_and_grad(f)(flat), *matrices, vector, f(flat + vector)

    @jax.jit
    def found(params, batch):
        vector = jax.tree.map(jnp.cos, params)
        hessian, gauss_newton = kfgn.hessian(objective), kfgn.gauss_newton(objective)
        (value, grads), curvature = kfgn.value_grad_and_curvature(objective, "kflr")(params, batch)
        directions = {n: jnp.cos(leaf) for n, leaf in _named(params).items()}
        pushed = curvature.linearized(directions)
        return {
            "value": (value, objective(params, batch), curvature.value),
            "gradient": (
                ravel_pytree(grads)[0],
                ravel_pytree(jax.grad(objective)(params, batch))[0],
            ),
            "hessian": hessian.dense(params, batch, with_l2=True),
            "product": ravel_pytree(hessian.matvec(params, batch, vector, with_l2=True))[0],
            "gauss-newton": gauss_newton.dense(params, batch),
            "diagonal": ravel_pytree(gauss_newton.diagonal_by_parameter(params, batch))[0],
            "blocks": gauss_newton.blocks(params, batch),
            "diagonals": gauss_newton.diagonal(params, batch),
            "form": curvature.output_product(pushed, pushed),
            "displaced": curvature.displaced(directions),
        }

    value, gradient, hessian, curved, vector, displaced = map(np.asarray, expected(flat))
    ours = found(params, batch)
    close(ours["value"], (value,) * 3)
    close(ours["gradient"], (gradient,) * 2)
    close(ours["hessian"], hessian, atol=1e-10)
    close(ours["product"], hessian @ vector, atol=1e-10)
    close(ours["gauss-newton"], curved, atol=1e-10)
    close(ours["diagonal"], np.diag(curved), atol=1e-10)
    close(ours["form"], vector @ curved @ vector)
    close(ours["displaced"], displaced)
    places = _named(jax.tree.map(np.asarray, unravel(jnp.arange(flat.size))))
    layers = kfgn.layers.find_blocks(objective, params, batch).layers
    # The Laplacian does not see the last bias, which has a block of its own.
    assert set(layers) == {"a", "b", "c/w", "c/b"}
    for name, layer in layers.items():
        index = np.concatenate([places[p].ravel() for p in layer.parameters]).astype(int)
        close(ours["blocks"][name], curved[np.ix_(index, index)], atol=1e-10)
        close(ours["diagonals"][name].ravel(), np.diag(curved)[index], atol=1e-10)


def _named(params):
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(k.key for k in path): leaf for path, leaf in pairs}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
def test_factors_are_merged(method):
    """With the trace of the sum; those of a single term, or of terms alike, are its own."""
    params, batch, objective = start(), poisson(), summed(l2=0.0)
    # A term beside itself with weights 1 and 2 is three times itself.
    alike = kfgn.sum_of([objective.terms["boundary"]] * 2, weights=[1.0, 2.0])

    @jax.jit
    def everything(params, batch):
        def of(objective, batch, **options):
            function = kfgn.value_grad_and_curvature(objective, method, **options)
            return function(params, batch)[1].factors

        edge = batch["boundary"]
        interior = of(objective.terms["interior"], batch["interior"], unassigned="gradient")
        parts = of(objective.terms["boundary"], edge), interior
        return of(objective, batch), of(alike, (edge, edge)), *parts

    factors, twice, once, own = jax.tree.map(np.asarray, everything(params, batch))
    assert set(twice) == {"a", "b", "c"} == set(once)
    for name, (q, g) in once.items():
        close(np.kron(*twice[name]), 3 * np.kron(q, g))
    # In the sum the last bias is apart, which is in the boundary alone.
    apart = once["c"]
    close(np.kron(*factors["c/b"]), 10 * apart.activation[-1:, -1:] * apart.pre_activation)
    for name, key in (("a", "a"), ("b", "b"), ("c/w", "c")):
        (q, g), (p, h) = own.get(name, own.get(key)), once[key]
        p = p[: len(q), : len(q)]
        traces = [np.trace(x) for x in (q, g, p, h)]
        found = [np.trace(x) for x in factors[name]]
        close(found[0] * found[1], traces[0] * traces[1] + 10 * traces[2] * traces[3])
        expected = q * traces[1] + 10 * traces[3] * p
        close(factors[name].activation / found[0], expected / np.trace(expected))


@pytest.mark.usefixtures("x64")
def test_two_terms_are_inverted_together():
    """Against the dense sum of both products; nearer to it than one product that stands for it."""
    params, batch, objective = start(), poisson(), summed(l2=0.0)
    blocks = kfgn.layers.find_blocks(objective, params, batch)
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    mean = kfgn.average_curvature([curvature, curvature])
    damping = 1e-2

    def direction(inverse, curvature):
        tx = kfgn.transforms.scale_by_kronecker(blocks, damping, decay=None, inverse=inverse)
        return _named(jax.jit(tx.update)(grads, tx.init(params), curvature=curvature)[0])

    found, merged = direction("two-term", mean), direction("factored", curvature)
    for name, layer in blocks.layers.items():
        g = np.asarray(layer.to_matrix(_named(grads))).ravel()
        own, other = (np.asarray(layer.to_matrix(d)).ravel() for d in (found, merged))
        if name not in blocks.shared:
            assert name == "c/b"  # that of one term
            continue
        terms = [[np.asarray(f) for f in term] for term in curvature.terms[name]]
        (q, k), larger = sorted(terms, key=lambda t: np.trace(t[0]) * np.trace(t[1]))
        balance, root = np.sqrt(np.mean(np.diag(q)) / np.mean(np.diag(k))), damping**0.5
        shifted = [q + balance * root * np.eye(len(q)), k + root / balance * np.eye(len(k))]
        close(own, np.linalg.solve(np.kron(*shifted) + np.kron(*larger), g), 1e-9, 1e-9)
        whole = sum(np.kron(*t) for t in terms) + damping * np.eye(len(g))
        exact = np.linalg.solve(whole, g)
        off, before = (np.linalg.norm(d - exact) / np.linalg.norm(exact) for d in (own, other))
        assert off < 0.95 * before, (name, off, before)  # both damp by more than 1e-2


@pytest.mark.usefixtures("x64")
def test_terms_that_are_merged_already_are_refused():
    params, batch, objective = start(), poisson(), summed(l2=0.0)
    optimizer, measured = kfgn.make(objective, params, batch, method="kflr", inverse="two-term")

    def step(params, batch):
        (_, grads), curvature = measured(params, batch)
        merged = curvature.with_factors(curvature.factors)
        return optimizer.update(grads, optimizer.init(params), params, curvature=merged)

    with pytest.raises(kfgn.errors.OptionError, match="needs the terms of layer 'a' apart"):
        jax.eval_shape(step, params, batch)


@pytest.mark.parametrize(
    ("alias", "options"),
    [("kfra", {}), ("kflr", {"inverse": "two-term"}), ("kfac", {})],
    ids=["kfra", "kflr, two-term", "kfac"],
)
def test_training(alias, options):
    """A physics-informed network, by each of the optimizers."""
    params, batch, objective = start(8), poisson(64, 32), summed(l2=1e-6)
    optimizer = getattr(kfgn, alias)(objective, params, batch, **options)
    function = kfgn.value_grad_and_curvature(objective, alias)

    @jax.jit
    def step(params, state, key):
        keyed = {"key": key} if alias == "kfac" else {}
        (value, grads), curvature = function(params, batch, **keyed)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for k in range(40):
        params, state, value = step(params, state, jax.random.key(k))
        values.append(float(value))
    assert values[-1] < 0.05 * values[0], values
    assert state[0].skipped == 0


@pytest.mark.usefixtures("x64")
def test_solvers_take_sums():
    params, batch, objective = start(3), poisson(), summed()
    gradient = jax.jit(jax.grad(objective))(params, batch)
    flat, unravel = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda p: truth(unravel(p), batch)))(flat)
    values, vectors = np.linalg.eigh(hessian)
    bent = vectors @ ((vectors.T @ ravel_pytree(gradient)[0]) / (np.abs(values) + 0.1))

    @functools.partial(jax.jit, static_argnames="structure")
    def direction(params, batch, gradient, structure):
        return kfgn.solvers.newton_direction(
            objective, params, batch, gradient, damping=0.1, structure=structure
        )

    solved = direction(params, batch, gradient, "full")
    close(ravel_pytree(solved.direction)[0], bent, 1e-8, 1e-8)
    blocks = direction(params, batch, gradient, "block")
    index = ravel_pytree(unravel(jnp.arange(flat.size))["b"])[0].astype(int)
    values, vectors = np.linalg.eigh(hessian[np.ix_(index, index)])
    own = vectors @ ((vectors.T @ ravel_pytree(gradient["b"])[0]) / (np.abs(values) + 0.1))
    close(ravel_pytree(blocks.direction["b"])[0], own, 1e-8, 1e-8)
    found = kfgn.solvers.minimize(objective, params, batch, max_iterations=20)
    assert found.values[-1] < found.values[0]
    tx = kfgn.transforms.scale_by_conjugate_gradient(
        objective, damping=0.1, tolerance=1e-10, preconditioner="gauss_newton_diagonal"
    )
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))(params, batch)
    update, dense = jax.jit(tx.update), jax.jit(kfgn.gauss_newton(objective).dense)
    step, _ = update(grads, tx.init(params), params, curvature=curvature, batch=batch)
    curved = dense(params, batch) + 0.12 * jnp.eye(flat.size)
    close(ravel_pytree(step)[0], jnp.linalg.solve(curved, ravel_pytree(grads)[0]), 1e-6, 1e-6)


def test_inspect_adds_costs():
    params, batch, objective = start(), poisson(), summed()
    found = kfgn.inspect(objective, params, batch, file=io.StringIO())
    parts = [
        kfgn.inspect(term, params, batch[name], file=io.StringIO()).totals
        for name, term in objective.terms.items()
    ]
    assert {row.name for row in found.rows} == {"a", "b", "c/w", "c/b"}
    assert found.totals.columns == sum(t.columns for t in parts) == 2
    assert found.totals.parameters == parts[0].parameters and not found.unassigned
    assert "c/w" in str(found)


@pytest.mark.usefixtures("x64")
def test_weights_micro_batches_and_aux():
    """Terms may have weighted batches; sums of equal parts average; aux is that of every term."""
    params, batch, l2 = start(), poisson(), 0.01
    terms = [kfgn.Objective(net, LOSS, l2=l2), kfgn.Objective(net, LOSS)]
    objective = kfgn.sum_of(terms, weights=[1.0, jnp.array(2.0)])
    (x, y), (edge, values) = batch["interior"], batch["boundary"]
    mask = jnp.arange(8) < 6
    function = jax.jit(kfgn.value_grad_and_curvature(objective, "kflr"))
    (value, grads), curvature = function(params, ((x, y), (edge, values, mask)))

    def own(p):
        outside = jnp.mean(0.5 * (net(p, edge[:6]) - values[:6]) ** 2)
        inside = jnp.mean(0.5 * (net(p, x) - y) ** 2)
        return inside + 2 * outside + l2 / 2 * optax.tree.norm(p, squared=True)

    close((value, grads), jax.jit(jax.value_and_grad(own))(params))
    assert curvature.examples == 18
    halves = [
        function(params, ((x[k], y[k]), (edge[k], values[k])))[1]
        for k in (slice(0, 4), slice(4, 8))
    ]
    whole = function(params, ((x[:8], y[:8]), (edge, values)))[1]

    @jax.jit
    def measured(curvature, directions):
        pushed = curvature.linearized(directions)
        return curvature.value, curvature.gradient, curvature.output_product(pushed, pushed)

    directions = jax.tree.map(np.cos, whole.gradient)
    close(measured(kfgn.average_curvature(halves), directions), measured(whole, directions))
    with_aux = kfgn.Objective(lambda p, z: (net(p, z), jnp.sum(z, axis=1)), LOSS, has_aux=True)
    both = kfgn.sum_of({"plain": terms[0], "told": with_aux})
    given = {"plain": (x, y), "told": (edge, values)}
    (value, aux), _ = jax.jit(kfgn.value_grad_and_curvature(both))(params, given)[0]
    close((value, aux["told"]), (both(params, given), jnp.sum(edge, axis=1)))


def test_merge_of_a_kernel_seen_transposed():
    """A decoder with the encoder's kernel transposed, and the encoder's own term."""
    w = jax.random.normal(jax.random.key(0), (4, 3))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    code = kfgn.Objective(lambda w, x: jnp.tanh(x @ w), LOSS)
    decode = kfgn.Objective(lambda w, h: h @ w.T, LOSS)
    objective = kfgn.sum_of({"code": code, "decode": decode})
    batch = {"code": (x, jnp.zeros((6, 3))), "decode": (jnp.ones((2, 3)), jnp.zeros((2, 4)))}
    optimizer = kfgn.kflr(objective, w, batch)

    @jax.jit
    def everything(w, batch):
        parts = [
            kfgn.value_grad_and_curvature(t, "kflr")(w, batch[n])[1].factors[""]
            for n, t in objective.terms.items()
        ]
        (_, grads), curvature = kfgn.value_grad_and_curvature(objective, "kflr")(w, batch)
        updates, _ = optimizer.update(grads, optimizer.init(w), w, curvature=curvature)
        values = [objective(at, batch) for at in (w, w + updates)]
        return parts, curvature.factors[""], values

    parts, (q, g), (before, after) = everything(w, batch)
    assert (q.shape, g.shape) == ((4, 4), (3, 3))
    traces = [jnp.trace(f) for part in parts for f in part]
    np.testing.assert_allclose(
        jnp.trace(q) * jnp.trace(g), traces[0] * traces[1] + traces[2] * traces[3], rtol=1e-5
    )
    assert after < before


def test_bad_input():
    params, batch, objective = start(), poisson(), summed()
    plain = objective.terms["boundary"]
    errors = kfgn.errors
    with pytest.raises(errors.OptionError, match=r"one kfgn\.Objective or more, found none"):
        kfgn.sum_of([])
    with pytest.raises(errors.OptionError, match="found function as term '0'"):
        kfgn.sum_of([net])
    with pytest.raises(errors.OptionError, match="weights must be like the terms"):
        kfgn.sum_of([plain, plain], weights=[1.0])
    with pytest.raises(errors.OptionError, match="weights must be like the terms"):
        kfgn.sum_of({"a": plain}, weights={"b": 1.0})
    with pytest.raises(errors.OptionError, match="the weight of the term 'a' must be finite"):
        kfgn.sum_of({"a": plain}, weights={"a": -1.0})
    for wrong in (batch["interior"], {"interior": batch["interior"]}, None):
        with pytest.raises(errors.BatchError, match="expected a batch for each term of the sum"):
            objective(params, wrong)
    bad = batch | {"boundary": (jnp.ones((4, 2)), jnp.zeros((3, 1)))}
    for call in (
        objective,
        kfgn.hessian(objective).dense,
        kfgn.value_grad_and_curvature(objective),
    ):
        with pytest.raises(
            errors.BatchError, match="in the term 'boundary' of the sum: inputs and"
        ):
            jax.eval_shape(call, params, bad)
    for call in (kfgn.hessian(objective).output, kfgn.gauss_newton(objective).pre_activation):
        with pytest.raises(errors.OptionError, match="ask its terms one by one"):
            call(params, batch)
    with pytest.raises(errors.OptionError, match="its terms one by one"):
        kfgn.diagnostics.negative_curvature(objective)
    odd = kfgn.Objective(lambda p, x: x[:, :1] * jnp.sum(jnp.tanh(p["a"]["w"])), LOSS)
    mixed = kfgn.sum_of({"net": plain, "odd": odd})
    edge = batch["boundary"]
    with pytest.raises(errors.LayerError, match=r"'a/w' .*meets data"):
        kfgn.layers.find_blocks(mixed, params, {"net": edge, "odd": edge}, unassigned="raise")
    with pytest.raises(errors.LayerError, match="at most 3 rows are formed"):
        kfgn.layers.find_blocks(objective, params, batch, factor_limit=3)


@pytest.mark.usefixtures("x64")
def test_what_is_no_layer_in_one_term_is_in_none():
    """Its block is exact, and the sum of the terms'."""
    params, edge = start(), poisson()["boundary"]
    odd = kfgn.Objective(lambda p, x: x[:, :1] * jnp.sum(jnp.tanh(p["a"]["w"])), LOSS)
    mixed = kfgn.sum_of({"net": kfgn.Objective(net, LOSS), "odd": odd}, weights={"odd": 2.0})
    batch = {"net": edge, "odd": edge}
    optimizer = kfgn.kflr(mixed, params, batch)

    @jax.jit
    def everything(params, batch):
        (_, grads), curvature = kfgn.value_grad_and_curvature(mixed, "kflr")(params, batch)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, curvature=curvature)
        values = [mixed(p, batch) for p in (params, optax.apply_updates(params, updates))]
        return curvature.factors, kfgn.gauss_newton(mixed).blocks(params, batch), values

    found, exact, (before, after) = everything(params, batch)
    assert set(found) == {"a/w", "a/b", "b", "c"}
    close(np.kron(*found["a/w"]), exact["a/w"])
    assert after < before
