"""Kronecker factors where they approximate, and the same curvature in other settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from kfgn.base.trees import named_leaves
from tests.tables.comparison import as_params, close, setting
from tests.tables.dense import dense_truth, indices, submatrix
from tests.tables.losses import LOSSES
from tests.tables.nets import Case, Slot, dense, normalize

float64 = pytest.mark.usefixtures("x64")


def factors_of(objective, method, params, batch, **options):
    """The factors of one method, as numpy arrays."""
    key = options.pop("key", None)
    function = kfgn.value_grad_and_curvature(objective, method, **options)
    _, curvature = jax.jit(function)(params, batch, key=key)
    return jax.tree.map(np.asarray, curvature.factors)


# KFRA with several examples, by hand.


def expected_by_hand(jacobians, matrix):
    """`E[J' M J]` of Jacobians `[N, D_out, D_in]`."""
    return jnp.mean(jnp.einsum("nij,ik,nkl->njl", jacobians, matrix, jacobians), axis=0)


@float64
@pytest.mark.parametrize("model", ["tanh", "softplus", "gelu", "leaky_relu", "tanh_layer_norm"])
def test_kfra_is_the_recursion_of_the_paper(model):
    """Eq. (26) written out; what lies between two layers is one node, LayerNorm included."""
    activation = {
        "tanh": jnp.tanh,
        "softplus": jax.nn.softplus,
        "gelu": jax.nn.gelu,
        "leaky_relu": jax.nn.leaky_relu,
        "tanh_layer_norm": lambda h: normalize(jnp.tanh(h)),
    }[model]
    case, objective, batch = setting(model, "one_hot")
    found = factors_of(objective, "kfra", case.params, batch)
    slopes = jax.vmap(jax.jacobian(activation))

    @jax.jit
    def by_hand(p, inputs, targets):
        first = dense(p["first"], inputs)
        second = dense(p["second"], activation(first))
        logits = dense(p["out"], activation(second))
        outputs = jax.vmap(jax.hessian(LOSSES["one_hot"].reference))(logits, targets)
        out = jnp.mean(outputs, axis=0)
        w = p["out"]["w"]
        middle = expected_by_hand(slopes(second), w @ out @ w.T)
        w = p["second"]["w"]
        return {
            "out": out,
            "second": middle,
            "first": expected_by_hand(slopes(first), w @ middle @ w.T),
        }

    for name, expected in by_hand(case.perturbable(), *batch).items():
        close(found[name].pre_activation, expected, name)


@float64
@pytest.mark.parametrize("branch", [jax.nn.softmax, normalize], ids=["softmax", "layer_norm"])
def test_kfra_behind_a_branch_that_mixes_units(branch):
    """The frontier written out: `E[J'MJ]` on the branch, `E[J']M` between it and the skip."""
    case, _, (inputs, targets) = setting("residual", "one_hot")

    def model(p, x):
        h = dense(p["first"], x)
        return dense(p["out"], branch(h)) + dense(p["skip"], h)

    params = {name: case.params[name] for name in ("first", "out")}
    params["skip"] = jax.tree.map(lambda a: jnp.cos(3 * a), params["out"])
    objective = kfgn.Objective(model, LOSSES["one_hot"].loss)
    found = factors_of(objective, "kfra", params, (inputs, targets))

    @jax.jit
    def by_hand(params, inputs, targets):
        jacobians = jax.vmap(jax.jacobian(branch))(dense(params["first"], inputs))
        outputs = jax.vmap(jax.hessian(LOSSES["one_hot"].reference))(model(params, inputs), targets)
        out = jnp.mean(outputs, axis=0)
        w, skip = (params[name]["w"] for name in ("out", "skip"))
        between = jnp.mean(jacobians, axis=0).T @ w @ out @ skip.T
        mixed, alone = (expected_by_hand(j, w @ out @ w.T) for j in (jacobians, jacobians[:1]))
        return mixed + between + between.T + skip @ out @ skip.T, mixed, alone

    expected, mixed, alone = by_hand(params, inputs, targets)
    close(found["first"].pre_activation, expected)
    # The examples differ, so that none of the expectations could be left out.
    assert np.max(np.abs(alone - mixed)) > 1e-3


@float64
@pytest.mark.parametrize("weighted", [False, True])
def test_kfra_before_a_pool(weighted):
    """`E[J'MJ]` where the Jacobian has few rows, of two outputs that both go on."""
    rng = np.random.default_rng(2)
    shapes = {"first": (5, 32), "mean": (2, 3), "largest": (2, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    inputs, targets = (jnp.asarray(rng.normal(size=(6, n))) for n in (5, 3))
    weights = jnp.asarray(rng.uniform(0.5, 2, size=6)) if weighted else jnp.ones(6)
    weights = weights / jnp.mean(weights)

    def pooled(h):
        groups = jnp.tanh(h).reshape(2, 16)
        return jnp.concatenate([jnp.mean(groups, axis=1), jax.nn.logsumexp(groups**2, axis=1)])

    def model(p, x):
        mean, largest = jnp.split(jax.vmap(pooled)(x @ p["first"]), 2, axis=1)
        return mean @ p["mean"] + largest @ p["largest"]

    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    batch = (inputs, targets, weights) if weighted else (inputs, targets)
    found = factors_of(objective, "kfra", params, batch)["first"]
    kernel = jnp.concatenate([params["mean"], params["largest"]])
    jacobians = jax.vmap(jax.jacobian(pooled))(inputs @ params["first"])
    # With half the squared error M is `W W'` times the weights' mean, which is 1.
    jacobians = jacobians * jnp.sqrt(weights)[:, None, None]
    close(found.pre_activation, expected_by_hand(jacobians, kernel @ kernel.T))


# A kernel used as it is and transposed.


@float64
@pytest.mark.parametrize("method", ["kflr", "empirical"])
def test_tied_and_transposed_kernel(method):
    """`Q ⊗ G` of the one use and `G ⊗ Q` of the other become one product with their trace."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 2)))
    inputs, targets = (jnp.asarray(rng.normal(size=(5, 3))) for _ in range(2))

    def model(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    q, g = factors_of(objective, method, {"w": kernel}, (inputs, targets))["w"]

    hidden = np.tanh(inputs @ kernel)
    errors = hidden @ kernel.T - targets
    slopes = (1 - hidden**2)[:, :, None] * np.asarray(kernel).T  # of the outputs, `[N, 2, 3]`
    rows, last = slopes, np.eye(3)[None].repeat(5, axis=0)
    if method == "empirical":
        rows, last = slopes @ errors[:, :, None], errors[:, :, None]

    def moment(x):
        return np.einsum("nik,njk->ij", x, x) / 5

    parts = [  # of h = x W, and of y = t W' as a product for W: its gradients stand on the left
        (moment(np.asarray(inputs)[:, :, None]), moment(rows)),
        (moment(last), moment(hidden[:, :, None])),
    ]
    traces = [(np.trace(a), np.trace(b)) for a, b in parts]
    whole = sum(np.kron(a, b) for a, b in parts)
    close(np.trace(np.kron(q, g)), np.trace(whole))
    for k, merged in enumerate((q, g)):
        weighted = sum(part[k] * trace[1 - k] for part, trace in zip(parts, traces, strict=True))
        close(merged / np.trace(merged), weighted / np.trace(weighted))


# KFAC.


@float64
@pytest.mark.parametrize(
    "loss",
    ["one_hot", "integer_labels", "squared_error", "sigmoid", "pseudo_huber", "coupled"],
)
def test_kfac_converges_to_kflr(loss):
    """The mean of its sampled factors is KFLR's, to within their standard error."""
    samples = 10_000
    case, objective, batch = setting("tanh_without_bias", loss, count=2)
    key = jax.random.key(11)
    found = factors_of(objective, "kfac", case.params, batch, samples=samples, key=key)
    truth = dense_truth(case, LOSSES[loss], batch[1])
    for name, place in indices(case).items():
        exact = submatrix(truth.gauss_newton, place.pre_activation)
        # Entry ij of one sample is g_i g_j. Were g normal its variance would be
        # G_ii G_jj + G_ij^2; labels have lighter tails only where probabilities
        # are not extreme, hence 8 deviations, not 5, for some 50 entries.
        diagonal = np.einsum("nii->ni", exact)
        variance = diagonal[:, :, None] * diagonal[:, None, :] + exact**2
        deviation = np.sqrt(np.mean(variance, axis=0) / (2 * samples))
        error = np.abs(found[name].pre_activation - np.mean(exact, axis=0))
        assert np.all(error < 8 * deviation), name
        # and not because the deviation is large
        assert np.max(error) < 0.1 * np.max(np.mean(exact, axis=0)), name


@float64
def test_kfac_depends_on_its_key_alone():
    """One key gives one result, another key another; samples differ from each other."""
    case, objective, batch = setting("tanh", "squared_error")  # whose targets are continuous
    arguments = (objective, "kfac", case.params, batch)
    one = factors_of(*arguments, key=jax.random.key(0))
    same = factors_of(*arguments, key=jax.random.key(0))
    other = factors_of(*arguments, key=jax.random.key(1))
    more = factors_of(*arguments, key=jax.random.key(0), samples=3)
    g = {k: f["out"].pre_activation for k, f in zip("abcd", (one, same, other, more), strict=True)}
    assert np.array_equal(g["a"], g["b"])
    assert not np.allclose(g["a"], g["c"])
    # Three samples that were alike would average to one of them.
    assert not np.allclose(g["a"], g["d"])


# Parameters in no layer.


@float64
def test_parameters_without_a_block():
    """They get gradients and are left out of the factors; those of layers stay exact."""
    case, _, (inputs, _) = setting("tanh")

    def model(p, x):
        h = jnp.tanh(dense(p["first"], x))
        scale, shift = (jax.nn.softmax(p["norm"][name]) for name in ("scale", "shift"))
        h = normalize(h) * scale + shift  # each of their entries is made of all
        return dense(p["out"], jnp.tanh(dense(p["second"], h)))

    norm = {"scale": jnp.linspace(0.5, 2, 5), "shift": jnp.linspace(-1, 1, 5)}
    params = {**case.params, "norm": norm}
    slots = {name: Slot(f"{name}/w", f"{name}/b") for name in case.slots}
    case = Case(model, params, inputs, slots)
    row = LOSSES["one_hot"]
    targets = row.targets(jax.random.key(0), model(params, inputs))
    objective = kfgn.Objective(model, row.loss)
    truth = dense_truth(case, row, targets)

    with pytest.raises(kfgn.errors.LayerError, match="norm/scale"):
        kfgn.value_grad_and_curvature(objective, "kflr", unassigned="raise")(
            params, (inputs, targets)
        )
    function = kfgn.value_grad_and_curvature(objective, "kflr", unassigned="gradient")
    (_, gradient), curvature = jax.jit(function)(params, (inputs, targets))
    assert set(curvature.factors) == set(slots)
    mean = np.mean(truth.gauss_newton, axis=0)
    for name, place in indices(case).items():
        expected = submatrix(mean, place.pre_activation)
        close(curvature.factors[name].pre_activation, expected, name)
    close(jax.flatten_util.ravel_pytree(gradient)[0], truth.gradient)
    direction = as_params(case, np.linspace(-1, 1, truth.gradient.size))
    named = {f"{layer}/{leaf}": x for layer, p in direction.items() for leaf, x in p.items()}
    flat = np.linspace(-1, 1, truth.gradient.size)
    close(curvature.linearized(named), truth.jacobian @ flat)


# Lower precision.


def test_float32():
    """Single precision is kept, and good to its own roundoff."""
    case, objective, batch = setting("residual", dtype=jnp.float32)
    truth = dense_truth(case, LOSSES["one_hot"], batch[1])
    hessian = jax.jit(kfgn.hessian(objective).pre_activation)(case.params, batch)
    factors = factors_of(objective, "kflr", case.params, batch)
    for name, place in indices(case).items():
        assert hessian[name].dtype == factors[name].pre_activation.dtype == np.float32
        # 1e-7 a rounding, as in `close` with three digits for cancellation.
        expected = submatrix(truth.hessian, place.pre_activation)
        close(hessian[name], expected, name, digits=1e-4)
        mean = np.mean(submatrix(truth.gauss_newton, place.pre_activation), axis=0)
        close(factors[name].pre_activation, mean, name, digits=1e-4)


@pytest.mark.parametrize("method", ["kfra", "kflr", "empirical"])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16], ids=["compute", "parameters"])
def test_bfloat16(method, stored):
    """Compute in bfloat16, parameters in either: factors in float32, correct to bfloat16's eps."""
    case, _, batch = setting("tanh", dtype=jnp.float32)
    one = jax.tree.map(lambda a: a[:1], batch)

    def model(p, x):
        def layer(p, x):
            return dense(jax.tree.map(lambda a: a.astype(jnp.bfloat16), p), x)

        h = jnp.tanh(layer(p["first"], x.astype(jnp.bfloat16)))
        h = jnp.tanh(layer(p["second"], h))
        return layer(p["out"], h).astype(jnp.float32)

    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case.params)
    params = jax.tree.map(lambda a: a.astype(stored), rounded)
    objective = kfgn.Objective(model, LOSSES["one_hot"].loss)
    function = kfgn.value_grad_and_curvature(objective, method)
    (value, gradient), curvature = jax.jit(function)(params, one)
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == stored for leaf in jax.tree.leaves(gradient))

    exact = jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
    truth = dense_truth(case._replace(params=exact, inputs=one[0]), LOSSES["one_hot"], one[1])
    for name, place in indices(case).items():
        q, g = curvature.factors[name]
        assert q.dtype == g.dtype == jnp.float32
        expected = submatrix(truth.gauss_newton[0], place.pre_activation)
        if method == "empirical":
            rows = truth.gradients[:, place.pre_activation]
            expected = rows.T @ rows
        # bfloat16 rounds at 1/256; some ten roundings on the way there and back.
        close(g, expected, name, digits=0.05)


@float64
@pytest.mark.parametrize("name", ["tanh", "attention", "selected"])
def test_quadratic_model_of_some_examples(name):
    """Spread evenly over the batch, with their own outputs and targets."""
    case, objective, (inputs, targets) = setting(name, count=9)
    batch = (inputs, targets)
    direction = jax.tree.map(jnp.ones_like, case.params)
    named = named_leaves(direction)

    def model_of(batch, examples):
        function = kfgn.value_grad_and_curvature(objective, model_examples=examples)
        (_, gradient), curvature = jax.jit(function)(case.params, batch)
        pushed = curvature.linearized(named)
        return gradient, pushed, curvature.output_product(pushed, pushed)

    gradient, pushed, curved = model_of(batch, 4)
    chosen = jax.tree.map(lambda a: a[np.array([0, 2, 4, 6])], batch)
    whole = model_of(batch, None)
    assert pushed.shape == (4, *whole[1].shape[1:]) and whole[1].shape[0] == 9
    _, expected, expected_curved = model_of(chosen, None)
    close(pushed, expected)
    close(curved, expected_curved)
    # More than half of them cannot be spread evenly: then all are taken.
    assert jax.eval_shape(lambda b: model_of(b, 5), batch)[1].shape == whole[1].shape
    close(jax.flatten_util.ravel_pytree(gradient)[0], jax.flatten_util.ravel_pytree(whole[0])[0])


def test_quadratic_model_runs_no_products_forward_again():
    """Two of the batch, and three of the linear pass: the pre-activations are known."""
    model = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    objective = kfgn.Objective(model, kfgn.losses.softmax_cross_entropy)
    function = kfgn.value_grad_and_curvature(objective, "empirical", model_examples=8)
    params, batch = (
        {"a": jnp.ones((5, 7)), "b": jnp.ones((7, 3))},
        (jnp.ones((64, 5)), jnp.ones((64, 3))),
    )

    def value_and_push(params, batch):
        curvature = function(params, batch)[1]
        return curvature.value, curvature.linearized(params)

    text = jax.jit(value_and_push).lower(params, batch).compile().as_text()
    assert text.count(" dot(") == 5
