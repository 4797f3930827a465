"""Each layer's Hessian by weights and biases, and its negative curvature, against dense truth."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import kfgn
from tests.tables.comparison import OPERATORS, close, setting
from tests.tables.comparison import compare as compare_with_truth
from tests.tables.dense import submatrix
from tests.tables.losses import LOSSES
from tests.tables.nets import chain

pytestmark = pytest.mark.usefixtures("x64")

COUNT = 3
SIZES = {"first": (3, 4), "second": (4, 3), "out": (3, 2)}
ACTIVATIONS = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
}
every_loss = pytest.mark.parametrize("loss", ["one_hot", "squared_error", "sigmoid"])
# The loss enters every activation's terms alike, by its gradients.
every_pair = pytest.mark.parametrize(
    ("activation", "loss"),
    [(activation, "one_hot") for activation in ACTIVATIONS]
    + [(activation, loss) for activation in ("tanh", "softplus", "relu")
       for loss in ("squared_error", "sigmoid")],
)  # fmt: skip


def split(verb):
    """The verb with weights and biases apart."""
    return functools.partial(verb, split_bias=True)


class Setup(NamedTuple):
    """A network of three layers, and the matrices of every example's loss."""

    objective: kfgn.Objective
    params: Any
    batch: Any
    entries: dict[str, dict[str, np.ndarray]]  # of each parameter in the vector of all
    hessian: np.ndarray  # `[N, P, P]`
    gauss_newton: np.ndarray  # `J'BJ`, likewise
    empirical_fisher: np.ndarray  # the outer products of the gradients, likewise

    def block(self, layer: str, row: str, column: str, kind: str = "hessian") -> np.ndarray:
        """The rows of one parameter and the columns of another, `[N, R, C]`."""
        rows, columns = (self.entries[layer][name].ravel() for name in (row, column))
        return getattr(self, kind)[:, rows[:, None], columns]


@functools.cache
def setup(activation: str, loss: str) -> Setup:
    rng, row = np.random.default_rng(0), LOSSES[loss]
    model = chain(ACTIVATIONS[activation])
    params = {
        name: {"w": jnp.asarray(rng.normal(size=size)), "b": jnp.asarray(rng.normal(size=size[1]))}
        for name, size in SIZES.items()
    }
    inputs = jnp.asarray(rng.normal(size=(COUNT, 3)))
    targets = row.targets(jax.random.key(1), model(params, inputs))
    flat, unravel = ravel_pytree(params)

    def one(x, y):
        def outputs(p):
            return model(unravel(p), x[None])[0]

        def loss(p):
            return row.reference(outputs(p), y)

        jacobian = jax.jacobian(outputs)(flat)
        curved = jax.hessian(lambda o: row.reference(o, y))(outputs(flat))
        gradient = jax.grad(loss)(flat)
        return (
            jax.hessian(loss)(flat),
            jacobian.T @ curved @ jacobian,
            gradient[:, None] * gradient,
        )

    truth = map(np.asarray, jax.jit(jax.vmap(one))(inputs, targets))
    entries = jax.tree.map(np.asarray, unravel(jnp.arange(flat.size, dtype=flat.dtype)))
    entries = jax.tree.map(lambda a: a.astype(int), entries)
    objective = kfgn.Objective(model, row.loss, l2=0.1)
    return Setup(objective, params, (inputs, targets), entries, *truth)


@functools.cache
def found(activation: str, loss: str) -> dict[str, Any]:
    """What kfgn says of it, in one compilation."""
    case = setup(activation, loss)

    def everything(params, batch):
        return {
            "mean": kfgn.hessian(case.objective).blocks(params, batch, split_bias=True),
            "each": kfgn.hessian(case.objective).blocks(
                params, batch, per_example=True, split_bias=True
            ),
            "negative": kfgn.diagnostics.negative_curvature(case.objective)(params, batch),
        }

    return jax.jit(everything)(case.params, case.batch)


@every_pair
def test_blocks(activation, loss):
    """Eqs. 68-70 and 78-80 of Veitch, for every example and on average."""
    case, ours = setup(activation, loss), found(activation, loss)
    assert set(ours["mean"]) == set(ours["each"]) == set(SIZES)
    for name in SIZES:
        for field, row, column in (
            ("weight_weight", "w", "w"),
            ("weight_bias", "w", "b"),
            ("bias_bias", "b", "b"),
        ):
            expected = case.block(name, row, column)
            scale = np.max(np.abs(case.hessian))  # a dead unit's block is all rounding
            close(getattr(ours["each"][name], field), expected, f"{name} {field}")
            mean = getattr(ours["mean"][name], field)
            assert np.max(np.abs(mean - np.mean(expected, axis=0))) < 1e-12 * scale


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("per_example", [False, True])
def test_blocks_of_every_operator(kind, per_example):
    """By weights and biases, and whole, for every example and on average."""
    case = setup("tanh", "one_hot")
    operator = OPERATORS[kind](case.objective)

    @jax.jit
    def everything(params, batch):
        verb = functools.partial(operator.blocks, params, batch, per_example=per_example)
        return verb(split_bias=True), verb()

    parts, whole = everything(case.params, case.batch)
    for name, entries in case.entries.items():
        for found, (row, column) in zip(parts[name], ("ww", "wb", "bb"), strict=True):
            expected = case.block(name, row, column, kind)
            close(found, expected if per_example else expected.mean(axis=0), name)
        order = np.concatenate([entries["w"], entries["b"][None]]).ravel()
        expected = getattr(case, kind)[:, order[:, None], order]
        close(whole[name], expected if per_example else expected.mean(axis=0), name)


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("per_example", [False, True])
def test_products(kind, per_example):
    """The same blocks times random vectors."""
    case = setup("tanh", "one_hot")
    rng = np.random.default_rng(2)
    vectors = {
        name: {key: rng.normal(size=leaf.shape) for key, leaf in layer.items()}
        for name, layer in case.params.items()
    }

    @jax.jit
    def everything(params, batch, vectors):
        matvecs = OPERATORS[kind](case.objective).block_matvecs(
            params, batch, per_example=per_example, split_bias=True
        )
        result = {}
        for name, own in vectors.items():
            of_weights = matvecs[name](own["w"], jnp.zeros_like(own["b"]))
            of_biases = matvecs[name](jnp.zeros_like(own["w"]), own["b"])
            keys = ("ww", "bw", "wb", "bb")
            result[name] = dict(zip(keys, (*of_weights, *of_biases), strict=True))
        return result

    for name, products in everything(case.params, case.batch, vectors).items():
        for (row, column), product in products.items():
            each = case.block(name, row, column, kind) @ vectors[name][column].ravel()
            each = each.reshape(COUNT, *vectors[name][row].shape)
            close(product, each if per_example else np.mean(each, axis=0), f"{name} {row}{column}")


def test_layers_without_bias():
    """Their one block is the layer's whole block."""
    compared = compare_with_truth("tanh_without_bias")
    case, objective, batch = setting("tanh_without_bias")
    mean = np.mean(compared.truth.hessian, axis=0)
    ours = jax.jit(split(kfgn.hessian(objective).blocks))(case.params, batch)
    matvecs = split(kfgn.hessian(objective).block_matvecs)(case.params, batch)
    assert set(ours) == set(matvecs) == set(compared.index)
    for name, place in compared.index.items():
        assert ours[name].weight_bias is ours[name].bias_bias is None
        close(ours[name].weight_weight, submatrix(mean, place.block))
    kernel = jnp.ones(case.params["out"]["w"].shape)
    product, none = jax.jit(matvecs["out"])(kernel)
    assert none is None
    close(product.ravel(), submatrix(mean, compared.index["out"].block) @ np.ones(kernel.size))


def scales_and_stacks(params, x):
    """A scale with a shift, a stack of kernels, and a parameter that is no layer."""
    h = x * params["norm"]["scale"] + params["norm"]["shift"]

    def body(h, layer):
        return jnp.tanh(h @ layer["w"] + layer["b"]), None

    h, _ = jax.lax.scan(body, h, params["stack"])
    return h @ params["out"] * jax.nn.softmax(params["bare"])


def test_other_layers():
    """Blocks with groups or slots, and one of a parameter in no layer: they add up to the whole."""
    rng = np.random.default_rng(3)
    shapes = {
        "norm": {"scale": (3,), "shift": (3,)},
        "stack": {"w": (2, 3, 3), "b": (2, 3)},
        "out": (3, 2),
        "bare": (2,),
    }
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    batch = (jnp.asarray(rng.normal(size=(COUNT, 3))), jnp.asarray(rng.normal(size=(COUNT, 2))))
    objective = kfgn.Objective(scales_and_stacks, kfgn.losses.half_squared_error)
    flat, unravel = ravel_pytree(params)
    index = unravel(jnp.arange(flat.size, dtype=flat.dtype))
    truth = jax.jit(jax.hessian(lambda p: objective.mean_loss(unravel(p), batch)))(flat)
    truth = np.asarray(truth)

    def at(row, column):
        row, column = (np.asarray(i).astype(int).ravel() for i in (row, column))
        return truth[row[:, None], column]

    dense = jax.jit(split(kfgn.hessian(objective).blocks))(params, batch)
    norm, stack = index["norm"], index["stack"]
    close(dense["norm"].weight_weight, at(norm["scale"], norm["scale"]))
    close(dense["norm"].weight_bias, at(norm["scale"], norm["shift"]))
    close(dense["norm"].bias_bias, at(norm["shift"], norm["shift"]))
    for k in range(2):
        close(dense["stack"].weight_weight[k], at(stack["w"][k], stack["w"][k]))
        close(dense["stack"].weight_bias[k], at(stack["w"][k], stack["b"][k]))
        close(dense["stack"].bias_bias[k], at(stack["b"][k], stack["b"][k]))
    close(dense["bare"].weight_weight, at(index["bare"], index["bare"]))

    @jax.jit
    def products(params, batch):
        matvecs = split(kfgn.hessian(objective).block_matvecs)(params, batch)
        scale = jnp.ones((3, 1, 1))
        return (
            matvecs["norm"](scale, jnp.zeros((3, 1)))[1],
            matvecs["stack"](jnp.zeros((2, 3, 3)), params["stack"]["b"])[0],
            matvecs["bare"](params["bare"])[0],
        )

    shifts, kernels, bare = products(params, batch)
    close(shifts.ravel(), at(norm["shift"], norm["scale"]) @ np.ones(3))
    for k in range(2):
        bias = np.asarray(params["stack"]["b"][k])
        close(kernels[k].ravel(), at(stack["w"][k], stack["b"][k]) @ bias)
    close(bare, at(index["bare"], index["bare"]) @ np.asarray(params["bare"]))


# Negative curvature.


@every_pair
def test_second_order_terms(activation, loss):
    """None in a piecewise-linear network with a convex loss, some in every other."""
    diagnosis = found(activation, loss)["negative"]
    assert set(diagnosis) == set(SIZES)
    for name, own in diagnosis.items():
        assert own.least <= own.greatest
        scale = own.gauss_newton_norm
        if activation == "relu" or name == "out":
            assert own.negative_share == 0
            assert own.least >= -1e-14 * scale
            assert own.second_order_norm <= 1e-14 * scale
            assert abs(own.second_order_trace) <= 1e-14 * scale
        else:
            assert own.second_order_norm > 1e-4 * scale
            assert abs(own.second_order_trace) > 0


def test_pre_activation_diagnosis():
    """Beside the eigenvalues of the matrices, which are those in the biases."""
    case, ours = setup("tanh", "one_hot"), found("tanh", "one_hot")["negative"]
    assert any(own.negative_share > 0 for own in ours.values())
    for name, own in ours.items():
        exact, positive = (case.block(name, "b", "b", k) for k in ("hessian", "gauss_newton"))
        compare(own, exact, positive, COUNT)


def test_block_diagnosis():
    """The mean block of a layer's parameters; one example may hide what the mean shows."""
    case = setup("tanh", "one_hot")
    function = jax.jit(kfgn.diagnostics.negative_curvature(case.objective, of="block"))
    ours = function(case.params, case.batch)
    assert ours["first"].negative_share > 0
    for name, own in ours.items():
        assert own.term_trace is own.term_norm is None
        entries = case.entries[name]
        order = np.concatenate([entries["w"], entries["b"][None]]).ravel()
        means = (np.mean(x, axis=0)[None] for x in (case.hessian, case.gauss_newton))
        compare(own, *(m[:, order[:, None], order] for m in means), 1)


def compare(own: kfgn.diagnostics.NegativeCurvature, exact: Any, positive: Any, count: int) -> None:
    exact, positive = np.asarray(exact), np.asarray(positive)
    values = np.linalg.eigvalsh(exact)
    beyond = exact - positive
    largest = np.max(np.abs(values), axis=1, keepdims=True)
    close(own.least, values.min())
    close(own.greatest, values.max())
    close(own.negative_share, np.mean(values < -1e-13 * largest))
    close(own.second_order_trace, np.einsum("nii->", beyond) / count)
    close(own.second_order_norm, np.sqrt(np.sum(beyond**2) / count))
    close(own.gauss_newton_norm, np.sqrt(np.sum(positive**2) / count))


SECOND = {
    "tanh": lambda z: -2 * np.tanh(z) * (1 - np.tanh(z) ** 2),
    "softplus": lambda z: 1 / (2 + np.exp(z) + np.exp(-z)),
    "relu": np.zeros_like,
}


@pytest.mark.parametrize("activation", SECOND)
@every_loss
def test_own_terms(activation, loss):
    """Eq. 87 of Veitch: the entries σ''(z_j) dE/dx_j, with the gradients by jax.grad."""
    case, ours = setup(activation, loss), found(activation, loss)["negative"]
    inputs, targets = case.batch
    transfer, reference, p = ACTIVATIONS[activation], LOSSES[loss].reference, case.params
    first = inputs @ p["first"]["w"] + p["first"]["b"]
    second = transfer(first) @ p["second"]["w"] + p["second"]["b"]

    def above_second(x, y):
        return reference(x @ p["out"]["w"] + p["out"]["b"], y)

    def above_first(x, y):
        return above_second(transfer(x @ p["second"]["w"] + p["second"]["b"]), y)

    for name, z, above in (("first", first, above_first), ("second", second, above_second)):
        gradients = jax.jit(jax.vmap(jax.grad(above)))(transfer(z), targets)
        terms = SECOND[activation](np.asarray(z)) * np.asarray(gradients)
        own, largest = ours[name], np.max(np.abs(terms), axis=1, keepdims=True)
        close(own.term_negative_share, np.mean(terms < -1e-13 * largest))
        close(own.term_positive_share, np.mean(terms > 1e-13 * largest))
        close(own.term_trace, np.sum(terms) / COUNT)
        close(own.term_norm, np.sqrt(np.sum(terms**2) / COUNT))
    assert ours["out"].term_norm == ours["out"].term_negative_share == 0


def test_own_terms_add_up():
    """Where paths meet and units mix: what congruences with the next layers' Hessians leave."""
    rng = np.random.default_rng(4)
    p = {name: jnp.asarray(rng.normal(size=(3, 3))) for name in ("first", "second", "out")}

    def next_of(z, p):
        """The pre-activations that the first one leads to: of the next layer, and the outputs'."""
        x = jax.nn.softmax(z) * jnp.sin(z[::-1])
        return x, z**2

    def model(p, x):
        def one(x):
            h, direct = next_of(x @ p["first"], p)
            return (jnp.tanh(h @ p["second"]) + direct) @ p["out"]

        return jax.vmap(one)(x)

    inputs, targets = jnp.asarray(rng.normal(size=(1, 3))), jnp.asarray(rng.normal(size=(1, 3)))
    objective = kfgn.Objective(model, kfgn.losses.half_squared_error)
    own = jax.jit(kfgn.diagnostics.negative_curvature(objective))(p, (inputs, targets))["first"]

    def ends(z):
        h, direct = next_of(z, p)
        return h @ p["second"], direct

    def loss(second, direct):
        outputs = (jnp.tanh(second) + direct) @ p["out"]
        return objective.loss(outputs, targets[0])

    z = inputs[0] @ p["first"]
    behind = jax.grad(loss, (0, 1))(*ends(z))
    truth = jax.hessian(lambda z: sum(jnp.vdot(g, e) for g, e in zip(behind, ends(z), strict=True)))
    values = np.linalg.eigvalsh(np.asarray(jax.jit(truth)(z)))
    close(own.term_trace, values.sum())
    close(own.term_norm, np.linalg.norm(values))
    close(own.term_negative_share, np.mean(values < 0))
    close(own.term_positive_share, np.mean(values > 0))


def test_losses_that_are_not_convex():
    """Their own negative curvature is seen in the last layer."""
    case, objective, batch = setting("tanh", "mixture")
    own = jax.jit(kfgn.diagnostics.negative_curvature(objective))(case.params, batch)["out"]
    assert own.least < 0 < own.negative_share
    assert own.second_order_norm > 0
    everything = jax.jit(kfgn.diagnostics.negative_curvature(objective, tolerance=1.0))(
        case.params, batch
    )["out"]
    assert everything.negative_share == 0


# Bad input.


@pytest.mark.parametrize("function", [*OPERATORS.values(), kfgn.diagnostics.negative_curvature])
def test_not_an_objective(function):
    with pytest.raises(kfgn.errors.OptionError, match="Objective, found"):
        function(jnp.tanh)


@pytest.mark.parametrize("verb", ["blocks", "block_matvecs"])
@pytest.mark.parametrize("option", ["per_example", "split_bias"])
def test_flags_are_checked(verb, option):
    case = setup("tanh", "one_hot")
    verb = getattr(kfgn.hessian(case.objective), verb)
    with pytest.raises(kfgn.errors.OptionError, match=f"{option} must be True or False"):
        verb(case.params, case.batch, **{option: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "layer"}, "of must be one of pre_activation, block"),
        ({"tolerance": -1.0}, "tolerance must be finite and at least 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(kfgn.errors.OptionError, match=message):
        kfgn.diagnostics.negative_curvature(setup("tanh", "one_hot").objective, **options)


def test_shapes_of_vectors_are_checked():
    case = setup("tanh", "one_hot")
    matvecs = split(kfgn.hessian(case.objective).block_matvecs)(case.params, case.batch)
    for arguments in (
        (jnp.ones((4, 4)), jnp.ones(4)),
        (jnp.ones((3, 4)), jnp.ones(3)),
        (jnp.ones((3, 4)),),
    ):
        message = r"'first' acts on .* \(\(3, 4\), \(4,\)\), found"
        with pytest.raises(kfgn.errors.ParameterError, match=message):
            matvecs["first"](*arguments)


def test_large_blocks_are_refused():
    """The error names the layer, the size and the remedy; the matvec works."""
    objective = kfgn.Objective(lambda p, x: x @ p["w"], kfgn.losses.half_squared_error)
    params, batch = {"w": jnp.zeros((150, 120))}, (jnp.ones((2, 150)), jnp.zeros((2, 120)))
    message = r"block of 'w' would have 1 x 18000 x 18000 entries \(2.4 GiB\).* block_matvecs"
    for function in (
        kfgn.hessian(objective).blocks,
        kfgn.diagnostics.negative_curvature(objective, of="block"),
    ):
        with pytest.raises(kfgn.errors.OptionError, match=message):
            function(params, batch)
    product = kfgn.hessian(objective).block_matvecs(params, batch)["w"]
    close(product(jnp.ones((150, 120))), np.full((150, 120), 150.0))
