"""Labels that are no class or are ignored, masked classes: what counts, and what is NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from tests.tables.comparison import close

LABELS = kfgn.losses.softmax_cross_entropy_with_integer_labels
ONE_HOT = kfgn.losses.softmax_cross_entropy
VERBS = (
    "value",
    "gradients",
    "hessian",
    "gauss_newton",
    "root",
    "product",
    "mean",
    "columns",
    "sampled",
)


def everything(loss, outputs, targets):
    """All verbs of a loss, `[N, ...]` where they are of each example."""

    @jax.jit
    def run(outputs, targets):
        vector = jnp.linspace(-1, 1, outputs[0].size, dtype=outputs.dtype)
        count, column = loss.sqrt_columns(outputs, targets)
        found = {
            "value": jax.vmap(loss)(outputs, targets),
            "gradients": loss.gradients(outputs, targets),
            "hessian": jax.vmap(loss.hessian)(outputs, targets),
            "gauss_newton": jax.vmap(loss.gauss_newton_hessian)(outputs, targets),
            "root": jax.vmap(loss.hessian_sqrt)(outputs, targets),
            "product": jax.vmap(lambda o, t: loss.gauss_newton_product(o, t, vector))(
                outputs, targets
            ),
            "mean": loss.mean_hessian(outputs, targets),
            "columns": jnp.stack([column(jnp.asarray(k)) for k in range(count)], axis=-1),
            "sampled": loss.sampled_gradients(jax.random.key(3), outputs, targets),
        }
        assert tuple(found) == VERBS
        return found

    return jax.tree.map(np.asarray, run(outputs, targets))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("label", [-1, -100, 3, 4, 2**31 - 1])
def test_labels_that_are_no_class(label):
    """Under jit all of such an example is NaN, and others are as ever; eagerly it raises."""
    outputs = jax.random.normal(jax.random.key(0), (3, 3))
    targets = jnp.asarray([0, label, 2])
    found = everything(LABELS, outputs, targets)
    good = everything(LABELS, outputs, targets.at[1].set(1))
    for verb in set(VERBS) - {"mean"}:
        assert np.all(np.isnan(found[verb][1]) | (good[verb][1] == 0)), verb
        assert np.any(np.isnan(found[verb][1])), verb
        np.testing.assert_array_equal(found[verb][::2], good[verb][::2], err_msg=verb)
    assert np.all(np.isnan(found["mean"]))

    objective = kfgn.Objective(lambda p, x: x @ p, LABELS)
    with pytest.raises(kfgn.errors.LossError, match=r"class indices in \[0, 2\].*ignore_index"):
        objective(jnp.eye(3), (outputs, targets))


def test_updates_are_skipped():
    """An update with a label that is no class leaves parameters and curvature as they are."""
    objective = kfgn.Objective(lambda p, x: x @ p["w"], LABELS)
    params = {"w": jnp.zeros((4, 3))}
    inputs = jax.random.normal(jax.random.key(0), (6, 4))
    good, bad = jnp.asarray([0, 1, 2, 0, 1, 2]), jnp.asarray([0, -1, 2, 0, 1, 2])
    optimizer = kfgn.kflr(objective, params, (inputs, good))
    compute = kfgn.value_grad_and_curvature(objective, method="kflr")

    @jax.jit
    def step(params, state, batch):
        (_, grads), curvature = compute(params, batch)
        updates, state = optimizer.update(grads, state, params, curvature=curvature, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    moved, state = step(params, optimizer.init(params), (inputs, good))
    stayed, state = step(moved, state, (inputs, bad))
    np.testing.assert_array_equal(moved["w"], stayed["w"])
    again, _ = step(stayed, state, (inputs, good))
    assert np.all(np.isfinite(again["w"])) and np.any(again["w"] != stayed["w"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("index", [-100, 1])
def test_ignored_labels(index):
    """Of an ignored position nothing is left, whatever its outputs; the rest is as without it."""
    loss = LABELS.with_options(ignore_index=index)
    outputs = jax.random.normal(jax.random.key(0), (2, 3, 3))
    outputs = outputs.at[0, 1].set(jnp.asarray([jnp.nan, -jnp.inf, jnp.inf]))
    targets = jnp.asarray([[0, index, 2], [index, index, index]])
    found = everything(loss, outputs, targets)
    for verb in set(VERBS) - {"mean"}:
        assert np.all(found[verb][1] == 0), verb
        assert np.all(np.isfinite(found[verb])), verb
    rest = everything(LABELS, outputs[:1, ::2], targets[:1, ::2])
    kept = np.asarray([0, 1, 2, 6, 7, 8])
    close(found["value"][0], rest["value"][0], "value")
    close(found["gradients"][0, kept], rest["gradients"][0], "gradients")
    close(found["hessian"][0][np.ix_(kept, kept)], rest["hessian"][0], "Hessian")
    close(found["mean"][np.ix_(kept, kept)], rest["hessian"][0] / 2, "mean")
    assert np.sum(found["hessian"] != 0) == np.sum(rest["hessian"] != 0)


@pytest.mark.usefixtures("x64")
def test_whole_objective_with_ignored_labels():
    """KFLR's, KFAC's and KFRA's G, gradient and Gauss-Newton matrix with padded examples."""
    loss = LABELS.with_options(ignore_index=-1)
    objective = kfgn.Objective(lambda p, x: x @ p["w"], loss)
    plain = kfgn.Objective(objective.model, LABELS)
    params = {"w": jax.random.normal(jax.random.key(1), (4, 3))}
    inputs = jax.random.normal(jax.random.key(0), (6, 4))
    targets = jnp.asarray([0, 1, 2, 0, -1, -1])
    batch, counted = (inputs, targets), (inputs[:4], targets[:4])
    for method in ("kfra", "kflr", "empirical"):
        of = [jax.jit(kfgn.value_grad_and_curvature(o, method=method)) for o in (objective, plain)]
        (value, grads), found = of[0](params, batch)
        (part, parts), expected = of[1](params, counted)
        close(value, part * 4 / 6, "value")
        close(grads["w"], parts["w"] * 4 / 6, "gradient")
        (name,) = found.factors
        close(
            found.factors[name].pre_activation,
            expected.factors[name].pre_activation * 4 / 6,
            method,
        )
        # Examples that are ignored are not in Q.
        close(found.factors[name].activation, expected.factors[name].activation, method)
    matrix = jax.jit(kfgn.gauss_newton(objective).dense)(params, batch)
    close(matrix, jax.jit(kfgn.gauss_newton(plain).dense)(params, counted) * 4 / 6, "matrix")
    kfac = kfgn.value_grad_and_curvature(objective, method="kfac", samples=3)
    all_ignored = (inputs, jnp.full(6, -1))
    _, found = kfac(params, all_ignored, key=jax.random.key(0))
    assert np.all(np.asarray(next(iter(found.factors.values())).pre_activation) == 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "classes"), [("uint8", 256), ("int8", 128), ("int16", 300)])
def test_small_integers(dtype, classes):
    """Labels of a dtype that cannot hold the number of classes, and what no dtype can hold."""
    outputs = jax.random.normal(jax.random.key(0), (3, classes))
    labels = np.asarray([0, 1, classes - 1])
    small = jnp.asarray(labels.astype(dtype))
    objective = kfgn.Objective(lambda p, x: p * x, LABELS.with_options(ignore_index=-100_000))
    logs = outputs - jax.scipy.special.logsumexp(outputs, axis=1, keepdims=True)
    expected = -np.mean(np.asarray(logs)[np.arange(3), labels])
    close(objective(jnp.asarray(1.0), (outputs, small)), expected, "value")
    close(jax.jit(objective)(jnp.asarray(1.0), (outputs, small)), expected, "value")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["labels", "one_hot", "soft"])
def test_masked_classes(kind):
    """Logits of -inf: all as without the class, zero at it, and infinite where it is the target."""
    loss = LABELS if kind == "labels" else ONE_HOT
    kept = np.asarray([0, 2, 3])
    outputs = jax.random.normal(jax.random.key(0), (4, 2, 5)).at[..., [1, 4]].set(-jnp.inf)
    labels = jax.random.randint(jax.random.key(1), (4, 2), 0, 3)
    soft = jax.nn.softmax(jax.random.normal(jax.random.key(2), (4, 2, 3)))
    small = {"labels": labels, "one_hot": jax.nn.one_hot(labels, 3), "soft": soft}[kind]
    targets = jnp.asarray(kept)[labels]
    if kind != "labels":
        targets = jnp.zeros((4, 2, 5)).at[..., kept].set(small)
    found = everything(loss, outputs, targets)
    expected = everything(loss, outputs[..., kept], small)
    entries = np.concatenate([kept, kept + 5])
    square = np.ix_(range(4), entries, entries)
    close(found["value"], expected["value"], "value")
    close(found["gradients"][:, entries], expected["gradients"], "gradients")
    close(found["hessian"][square], expected["hessian"], "Hessian")
    for name in ("root", "columns"):
        product = found[name] @ np.swapaxes(found[name], 1, 2)
        close(product, found["gauss_newton"], name)
    close(found["gauss_newton"], found["hessian"], "Gauss-Newton")
    close(found["mean"], np.mean(found["hessian"], axis=0), "mean")
    out = np.asarray([1, 4, 6, 9])
    assert np.all(found["hessian"][:, out] == 0) and np.all(found["gradients"][:, out] == 0)
    assert all(np.all(np.isfinite(found[verb])) for verb in VERBS)

    # jax differentiates the loss itself as well.
    hessians = jax.jit(jax.vmap(jax.hessian(loss)))(outputs, targets)
    close(np.asarray(hessians).reshape(4, 10, 10), found["hessian"], "jax.hessian")

    masked = jnp.full_like(labels, 1)
    wrong = masked if kind == "labels" else jax.nn.one_hot(masked, 5)
    assert np.all(np.isposinf(everything(loss, outputs, wrong)["value"]))


@pytest.mark.usefixtures("x64")
def test_certain_bernoulli_and_poisson_outputs():
    """Logits of ±inf and log rates of -inf: zero where the target agrees, else infinite."""
    loss = kfgn.losses.sigmoid_binary_cross_entropy
    outputs = jnp.asarray([[jnp.inf, -jnp.inf, 0.5]])
    found = everything(loss, outputs, jnp.asarray([[1.0, 0.0, 1.0]]))
    assert all(np.all(np.isfinite(found[verb])) for verb in VERBS)
    close(found["value"][0], np.logaddexp(0, 0.5) - 0.5, "value")
    for target in ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.0, 1.0]):
        assert np.isposinf(everything(loss, outputs, jnp.asarray([target]))["value"])

    loss = kfgn.losses.poisson_negative_log_likelihood
    outputs = jnp.asarray([[-jnp.inf, 0.0]])
    found = everything(loss, outputs, jnp.asarray([[0.0, 2.0]]))
    assert all(np.all(np.isfinite(found[verb])) for verb in VERBS)
    assert found["value"] == 1
    assert np.isposinf(everything(loss, outputs, jnp.ones((1, 2)))["value"])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ONE_HOT, {"ignore_index": 1}),
        (LABELS, {"ignore_index": 0.5}),
        (LABELS, {"class_weights": [1.0, -1.0]}),
        (LABELS, {"class_weights": 3.0}),
        (LABELS, {"label_smoothing": 1.5}),
    ],
)
def test_wrong_options(loss, options):
    with pytest.raises(kfgn.errors.OptionError, match=next(iter(options))):
        loss.with_options(**options)


def test_options_add_up_and_are_told():
    """One call or two; and the number of weights must be that of the classes."""
    both = LABELS.with_options(ignore_index=-1).with_options(label_smoothing=0.5)
    assert both.ignore_index == -1 and both.label_smoothing == 0.5
    assert "ignore_index=-1, label_smoothing=0.5" in repr(both)
    objective = kfgn.Objective(lambda p, x: x, LABELS.with_options(class_weights=np.ones(2)))
    with pytest.raises(kfgn.errors.LossError, match="3 classes, and there are 2"):
        objective({}, (jnp.ones((1, 3)), jnp.zeros(1, int)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", ["where", "added"])
def test_models_with_masked_classes(mask):
    """Value, gradient and curvature with a class masked by -inf are those without the class."""
    kept = np.asarray([0, 2, 3])
    allowed = jnp.zeros(4, bool).at[kept].set(True)
    barrier = jnp.where(allowed, 0, -jnp.inf)

    def masked(p, x):
        outputs = jnp.tanh(x @ p["first"]) @ p["last"]
        return jnp.where(allowed, outputs, -jnp.inf) if mask == "where" else outputs + barrier

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (5, 6)),
        "last": jax.random.normal(keys[1], (6, 4)),
    }
    inputs, labels = jax.random.normal(keys[2], (8, 5)), jnp.arange(8) % 3

    def matrix(model, params, targets):
        objective = kfgn.Objective(model, LABELS)
        compute = kfgn.value_grad_and_curvature(objective, method="kflr")
        (value, grads), found = jax.jit(compute)(params, (inputs, targets))
        factors = list(found.factors.values())
        return value, grads, [f.pre_activation for f in factors]

    value, grads, curved = matrix(masked, params, jnp.asarray(kept)[labels])
    small = {**params, "last": params["last"][:, kept]}
    expected = matrix(lambda p, x: jnp.tanh(x @ p["first"]) @ p["last"], small, labels)
    close(value, expected[0], "value")
    close(grads["first"], expected[1]["first"], "first")
    close(grads["last"][:, kept], expected[1]["last"], "last")
    assert np.all(np.asarray(grads["last"][:, 1]) == 0)
    close(curved[0], expected[2][0], "G of the first layer")
    close(np.asarray(curved[1])[np.ix_(kept, kept)], expected[2][1], "G of the last layer")
    assert np.all(np.asarray(curved[1])[1] == 0)
