"""Bad input to models of any kind raises a kfgn error with what was found and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from kfgn.errors import BatchError, LayerError, LossError, ModelError, OptionError, ParameterError

COUNT, LENGTH, FEATURES, CLASSES = 4, 3, 2, 2
LABELS = kfgn.losses.softmax_cross_entropy_with_integer_labels
SQUARED = kfgn.losses.half_squared_error


def array(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def affine(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def convolving(params, x):
    """A convolution, a LayerNorm, the mean over positions and the logits."""
    dimensions = ("NWC", "WIO", "NWC")
    h = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1,), "SAME", dimension_numbers=dimensions
    )
    h = h + params["conv"]["bias"]
    h = (h - jnp.mean(h, axis=2, keepdims=True)) * params["norm"]["scale"] + params["norm"]["bias"]
    return affine(params["out"], jnp.mean(jnp.tanh(h), axis=1))


OUT = {"kernel": array(0, FEATURES, CLASSES), "bias": jnp.zeros(CLASSES)}
PARAMS = {
    "conv": {"kernel": array(1, 3, FEATURES, FEATURES), "bias": jnp.zeros(FEATURES)},
    "norm": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)},
    "out": OUT,
}
INPUT = array(2, COUNT, LENGTH, FEATURES)
BATCH = (INPUT, jnp.array([0, 1, 1, 0]))


def weight_normalized(params, x):
    """A kernel of columns with lengths of their own."""
    lengths = jnp.sqrt(jnp.sum(jnp.square(params["v"]), axis=0))
    h = jnp.mean(x, axis=1) @ (params["v"] * (params["g"] / lengths))
    return affine(params["out"], jnp.tanh(h))


def widely_normalized(params, x):
    h = jnp.mean(x, axis=1) @ (params["v"] / jnp.linalg.norm(params["v"], axis=0))
    return affine(params["out"], jnp.tanh(h[:, :FEATURES] + h[:, FEATURES : 2 * FEATURES]))


WIDELY_NORMALIZED = {"v": array(4, FEATURES, 600), "out": OUT}
WEIGHT_NORMALIZED = {"g": jnp.ones(FEATURES), "v": array(3, FEATURES, FEATURES), "out": OUT}


def optimizer(
    model: Any = convolving,
    params: Any = PARAMS,
    batch: Any = BATCH,
    loss: Any = LABELS,
    method: str = "kfra",
    **options: Any,
) -> Any:
    del method
    return kfgn.kfra(kfgn.Objective(model, loss), params, batch, **options)


def curvature(
    model: Any = convolving,
    params: Any = PARAMS,
    batch: Any = BATCH,
    loss: Any = LABELS,
    method: str = "kfra",
    **options: Any,
) -> Any:
    key = {"key": jax.random.key(0)} if method == "kfac" else {}
    function = kfgn.value_grad_and_curvature(kfgn.Objective(model, loss), method, **options)
    return function(params, batch, **key)


def with_parameter(**more: Any) -> Any:
    return {**PARAMS, **more}


class Bad(NamedTuple):
    arguments: dict[str, Any]  # what is not as it is above
    error: type[kfgn.errors.KfgnError]
    message: str  # a regular expression


NEVER_MEETS = r"'c' \(shape \(2,\)\) never meets data: no output depends on it[\s\S]*"
NEVER_MEETS += r"unassigned=\"diagonal\" [\s\S]*unassigned=\"gradient\" [\s\S]*close over them"
WITHOUT_DERIVATIVE = r"'conv/kernel' [\s\S]*never meets data[\s\S]*'out/bias' [\s\S]*never meets"

# Whatever of the two is asked first tells.
CASES = {
    # Batches.
    "inputs of different sizes": Bad(
        {
            "model": lambda p, x: convolving(p, x["a"]),
            "batch": ({"a": INPUT, "mask": INPUT[:3]}, BATCH[1]),
        },
        BatchError,
        r"differ in their number of examples: inputs/a has 4, inputs/mask has 3, targets has 4",
    ),
    "targets of different sizes": Bad(
        {"batch": (INPUT, {"label": BATCH[1], "weight": jnp.ones(2)})},
        BatchError,
        r"inputs has 4, targets/label has 4, targets/weight has 2",
    ),
    "one sequence, not in a batch": Bad(
        {"batch": (INPUT[0], BATCH[1])}, BatchError, "inputs has 3, targets has 4"
    ),
    "no tuple": Bad(
        {"batch": {"image": INPUT, "label": BATCH[1]}},
        BatchError,
        r"expected batch = \(inputs, targets\) or \(inputs, targets, weights\), found a dict; for",
    ),
    "four members": Bad(
        {"batch": (INPUT, INPUT, BATCH[1], BATCH[1])}, BatchError, "found a tuple of length 4"
    ),
    # Parameters.
    "no parameters": Bad(
        {"model": lambda p, x: jnp.mean(x, axis=1), "params": {"conv": {}}},
        ParameterError,
        "params have no leaves: expected a pytree of floating-point arrays",
    ),
    "integer parameters": Bad(
        {"params": with_parameter(step=jnp.int32(3))},
        ParameterError,
        r"'step' must be a floating-point array, found dtype int32; keep counters .* out of the",
    ),
    "shape read alone": Bad(
        {
            "model": lambda p, x: convolving(p, x) * jnp.ones_like(p["c"]),
            "params": with_parameter(c=jnp.ones(2)),
        },
        LayerError,
        NEVER_MEETS,
    ),
    "used through a constant": Bad(
        {
            "model": lambda p, x: convolving(p, x) * jax.lax.stop_gradient(p["c"]),
            "params": with_parameter(c=jnp.ones(2)),
        },
        LayerError,
        NEVER_MEETS,
    ),
    # Outputs.
    "integer output": Bad(
        {"model": lambda p, x: jnp.round(convolving(p, x)).astype(jnp.int32)},
        ModelError,
        r"output[\s\S]*int32[\s\S]*floating",
    ),
    "argmax output": Bad(
        {
            "model": lambda p, x: jnp.argmax(convolving(p, x), axis=1).astype(jnp.int32),
            "batch": (INPUT, jnp.zeros(COUNT, jnp.int32)),
            "loss": SQUARED,
        },
        ModelError,
        r"output[\s\S]*int32[\s\S]*floating",
    ),
    "integer output among others": Bad(
        {
            "model": lambda p, x: {
                "logits": convolving(p, x),
                "label": jnp.argmax(convolving(p, x), axis=1).astype(jnp.int32),
            },
            "loss": kfgn.losses.from_function(lambda o, t: LABELS(o["logits"], t), convex=True),
        },
        ModelError,
        r"'label'[\s\S]*int32[\s\S]*floating",
    ),
    "output without a derivative": Bad(
        {"model": lambda p, x: jax.nn.one_hot(jnp.argmax(convolving(p, x), axis=1), CLASSES)},
        LayerError,
        WITHOUT_DERIVATIVE,
    ),
    "output behind stop_gradient": Bad(
        {"model": lambda p, x: jax.lax.stop_gradient(convolving(p, x))},
        LayerError,
        WITHOUT_DERIVATIVE,
    ),
    # Losses.
    "loss returns a vector": Bad(
        {"loss": kfgn.losses.from_function(lambda outputs, target: jnp.square(outputs - 1))},
        LossError,
        r"must return a scalar for one example, but returned \(2,\); sum it over the outputs",
    ),
    # Layers.
    "weight normalization": Bad(
        {"model": weight_normalized, "params": WEIGHT_NORMALIZED, "unassigned": "raise"},
        LayerError,
        r"2 parameter\(s\) belong to no layer[\s\S]*"
        r"'g' \(shape \(2,\)\) meets data in `dot_general` together with 'v'[\s\S]*"
        r"'v' \(shape \(2, 2\)\) meets data in `dot_general` together with 'g'[\s\S]*"
        r"unassigned=\"diagonal\" [\s\S]*unassigned=\"gradient\" [\s\S]*close over them",
    ),
    "normalized kernel too large for a block of its own": Bad(
        {"model": widely_normalized, "params": WIDELY_NORMALIZED},
        LayerError,
        r"1 parameter\(s\) [\s\S]*'v' \(shape \(2, 600\)\) meets data in `dot_general`, in a way "
        r"that is no layer; a block of its own would have 1,200 rows, and at most 1,024 are formed"
        r"[\s\S]*"
        r"entries that are made of several entries of parameters, as those of a normalized kernel"
        r"[\s\S]*unassigned=\"diagonal\"",
    ),
    # Options.
    "unknown unassigned": Bad(
        {"unassigned": "skip"},
        OptionError,
        "unassigned must be one of block, raise, diagonal, gradient, found 'skip'",
    ),
    "unassigned as a flag": Bad({"unassigned": True}, OptionError, "unassigned .* found True"),
}


def raises(act: Callable[[], Any], error: type[kfgn.errors.KfgnError], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        act()
    assert type(raised.value) is error


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("act", [optimizer, curvature])
def test_error(act, name):
    arguments, error, message = CASES[name]
    raises(lambda: act(**arguments), error, message)


@pytest.mark.parametrize("name", ["integer output", "argmax output", "output behind stop_gradient"])
@pytest.mark.parametrize("method", ["kflr", "kfac", "empirical"])
def test_error_of_every_method(method, name):
    """Before a method gets to its own way through the model."""
    arguments, error, message = CASES[name]
    raises(lambda: curvature(**arguments, method=method), error, message)


@pytest.mark.parametrize("sharing", ["mean", None])
def test_unknown_sharing(sharing):
    message = f"sharing must be one of expand, reduce, found {sharing!r}"
    raises(lambda: curvature(method="kflr", sharing=sharing), OptionError, message)


def test_sharing_belongs_to_the_curvature():
    raises(lambda: optimizer(sharing="reduce"), TypeError, "unexpected keyword .*'sharing'")


@pytest.mark.parametrize(
    ("layer", "inside", "outside"), [("conv", "kernel", "bias"), ("norm", "scale", "bias")]
)
def test_mask_that_splits_a_layer(layer, inside, outside):
    mask = jax.tree.map(lambda _: True, PARAMS)
    mask[layer][outside] = False
    message = f"'{layer}' is split: '{layer}/{inside}' is .* '{layer}/{outside}' is masked out"
    tx = optax.masked(optimizer(), mask)
    raises(lambda: tx.init(PARAMS), ParameterError, message + "[\\s\\S]*select whole layers")


# Weight normalization: a kernel made of two parameters, which are in no layer.


@pytest.mark.parametrize("method", ["kfra", "kflr"])
@pytest.mark.parametrize("unassigned", ["block", "diagonal", "gradient"])
def test_weight_normalization_trains(unassigned, method):
    objective = kfgn.Objective(weight_normalized, LABELS)
    tx = getattr(kfgn, method)(objective, WEIGHT_NORMALIZED, BATCH, unassigned=unassigned)
    curvature_fn = kfgn.value_grad_and_curvature(objective, method, unassigned=unassigned)

    @jax.jit
    def step(params, state):
        (value, grads), found = curvature_fn(params, BATCH)
        updates, state = tx.update(grads, state, params, curvature=found)
        return optax.apply_updates(params, updates), state, value

    params, state, losses = WEIGHT_NORMALIZED, tx.init(WEIGHT_NORMALIZED), []
    for _ in range(3):
        params, state, value = step(params, state)
        losses.append(value)
    losses.append(objective(params, BATCH))
    assert np.all(np.diff(losses) < 0), losses
    assert int(optax.tree_utils.tree_get(state, "skipped")) == 0
    assert jnp.any(params["g"] != WEIGHT_NORMALIZED["g"])
    assert jnp.any(params["v"] != WEIGHT_NORMALIZED["v"])


def test_a_block_too_large_has_a_diagonal():
    options = {"model": widely_normalized, "params": WIDELY_NORMALIZED, "unassigned": "diagonal"}
    _, found = curvature(**options)
    assert found.factors["v"].diagonal.shape == (FEATURES, 600)
    assert jax.tree.leaves(optimizer(**options).init(WIDELY_NORMALIZED))


def test_curvature_lacks_the_diagonals_of_the_optimizer():
    """What one of the two was told about parameters in no layer, the other has to be told."""
    arguments = {"model": weight_normalized, "params": WEIGHT_NORMALIZED}
    tx = optimizer(**arguments, unassigned="diagonal")
    (_, grads), found = curvature(**arguments, unassigned="gradient")
    state = tx.init(WEIGHT_NORMALIZED)
    raises(
        lambda: tx.update(grads, state, WEIGHT_NORMALIZED, curvature=found),
        ParameterError,
        r"'g', 'v'[\s\S]*unassigned=\"diagonal\"[\s\S]*value_grad_and_curvature",
    )


# An image too large for the joint matrix of KFRA; shapes alone.


def of_large_images(params, x):
    dimensions = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    return affine(params["out"], jnp.mean(jnp.tanh(h + params["conv"]["bias"]), axis=(1, 2)))


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


LARGE = kfgn.Objective(of_large_images, LABELS)
LARGE_PARAMS = {
    "conv": {"kernel": shaped(3, 3, 3, 64), "bias": shaped(64)},
    "out": {"kernel": shaped(64, CLASSES), "bias": shaped(CLASSES)},
}
LARGE_BATCH = (shaped(COUNT, 64, 64, 3), shaped(COUNT, dtype=jnp.int32))


def test_matrix_too_large_for_the_recursion():
    curvature_fn = kfgn.value_grad_and_curvature(LARGE, "kfra")
    raises(
        lambda: jax.eval_shape(curvature_fn, LARGE_PARAMS, LARGE_BATCH),
        ModelError,
        r"matrix over a value of 262144 entries per example would have 262144 x 262144 entries "
        r"\(256.0 GiB\); the most that is formed is 2 GiB[\s\S]*spatial=\"homogeneous\".*\"kflr\"",
    )


@pytest.mark.parametrize("options", [{"spatial": "homogeneous"}, {"method": "kflr"}])
def test_remedies_for_a_matrix_too_large(options):
    curvature_fn = kfgn.value_grad_and_curvature(LARGE, **options)
    _, found = jax.eval_shape(curvature_fn, LARGE_PARAMS, LARGE_BATCH)
    assert found.factors["conv"].activation.shape == (28, 28)
    assert found.factors["conv"].pre_activation.shape == (64, 64)
