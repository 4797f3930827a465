"""Bad input raises a kfgn error that says what was found, what is expected, and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfgn
from tests.tables.small import (
    CLASSES,
    HIDDEN,
    INPUTS,
    LOSS,
    OBJECTIVE,
    make_batch,
    make_params,
    network,
)

COUNT = 8
INPUT, LABELS = make_batch(count=COUNT)
BATCH = (INPUT, LABELS)
PARAMS = make_params()
TARGETS = jnp.full((COUNT, CLASSES), 1 / CLASSES)


def params_with(**changes: Any) -> Any:
    """The parameters with entries `layer__leaf` replaced, added, or removed (None)."""
    params = {name: dict(layer) for name, layer in PARAMS.items()}
    for path, leaf in changes.items():
        layer, _, name = path.partition("__")
        if leaf is None:
            del params[layer][name]
        else:
            params.setdefault(layer, {})[name] = leaf
    return params


def objective(model: Any = network, loss: Any = LOSS, **options: Any) -> kfgn.Objective:
    return kfgn.Objective(model, loss, **options)


def compute(
    of: Any = OBJECTIVE, params: Any = PARAMS, batch: Any = BATCH, method: str = "kfra", **options
) -> Any:
    """The curvature, by one plain call."""
    sampling = {"key": options.pop("key")} if "key" in options else {}
    return kfgn.value_grad_and_curvature(of, method, **options)(params, batch, **sampling)


def kfra(of: Any = OBJECTIVE, params: Any = PARAMS, batch: Any = BATCH, **options: Any) -> Any:
    return kfgn.kfra(of, params, batch, **options)


@functools.cache
def good() -> Any:
    (_, grads), curvature = jax.jit(kfgn.value_grad_and_curvature(OBJECTIVE))(PARAMS, BATCH)
    return grads, curvature


@functools.cache
def blocks() -> kfgn.layers.LayerBlocks:
    return kfgn.layers.find_blocks(OBJECTIVE, PARAMS, BATCH)


def kronecker(*args: Any, **options: Any) -> Any:
    return kfgn.transforms.scale_by_kronecker(blocks(), *args, **options)


def update(tx: Any, grads: Any = None, state: Any = None, **arguments: Any) -> Any:
    """One update, of which everything that is not given is right."""
    arguments = {"curvature": good()[1], **arguments}
    state = tx.init(PARAMS) if state is None else state
    return tx.update(good()[0] if grads is None else grads, state, PARAMS, **arguments)


@functools.cache
def other_curvature() -> Any:
    """The curvature of another model."""
    params = {"w": jnp.ones((INPUTS, CLASSES))}
    return compute(objective(lambda p, x: x @ p["w"]), params)[1]


@functools.cache
def wider_curvature() -> Any:
    """The curvature of a model with the same names and other shapes."""
    wider = HIDDEN + 1
    params = params_with(
        hidden__kernel=jnp.ones((INPUTS, wider)),
        hidden__bias=jnp.ones(wider),
        out__kernel=jnp.ones((wider, CLASSES)),
    )
    return compute(params=params)[1]


# Models with a parameter in no block.


def normalized(params, x):
    h = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    h = (h - jnp.mean(h, axis=1, keepdims=True)) * jax.nn.softmax(params["norm"]["scale"]) * HIDDEN
    return jnp.tanh(h) @ params["out"]["kernel"] + params["out"]["bias"]


NORMALIZED = params_with(norm__scale=jnp.ones(HIDDEN))


def convolving(params, x):
    dimensions = ("NCH", "IOH", "NCH")
    kernel = params["conv"] / jnp.linalg.norm(params["conv"])
    h = jax.lax.conv_general_dilated(x[:, None], kernel, (1,), "SAME", dimension_numbers=dimensions)
    return h.reshape(len(x), -1) @ params["out"]["kernel"] + params["out"]["bias"]


CONVOLVING = {
    "conv": jnp.full((1, 2, 3), 0.3),
    "out": {"kernel": jnp.full((2 * INPUTS, CLASSES), 0.1), "bias": jnp.zeros(CLASSES)},
}


def tied(params, x):
    h = jnp.tanh(x @ params["tied"]["kernel"])
    h = jnp.maximum(h @ params["tied"]["kernel"].T, params["tied"]["kernel"][:, 0])
    return h @ params["out"]["kernel"] + params["out"]["bias"]


TIED = {
    "tied": {"kernel": PARAMS["hidden"]["kernel"]},
    "out": {"kernel": jnp.ones((INPUTS, CLASSES)), "bias": jnp.zeros(CLASSES)},
}


def used_once(params, x):
    return network(params, x)


UNUSED = params_with(unused__w=jnp.ones(2))

WITHOUT_BLOCK = {
    "softmax of a scale": (normalized, NORMALIZED, "norm/scale", "`mul`"),
    "normalized convolution": (convolving, CONVOLVING, "conv", "conv_general_dilated"),
    "tied kernel": (tied, TIED, "tied/kernel", "meets data 3 times"),
    "unused": (used_once, UNUSED, "unused/w", "never meets data"),
}


def without_diagonals() -> Any:
    """An update by diagonals with the curvature of "gradient"."""
    of = objective(normalized)
    found = kfgn.layers.find_blocks(of, NORMALIZED, BATCH, unassigned="diagonal")
    tx = kfgn.transforms.scale_by_kronecker(found)
    curvature = compute(of, NORMALIZED, unassigned="gradient")[1]
    return tx.update(NORMALIZED, tx.init(NORMALIZED), curvature=curvature)


mixed_mask = jax.tree.map(lambda _: True, PARAMS)
mixed_mask["hidden"]["bias"] = False


class Bad(NamedTuple):
    act: Callable[[], Any]
    error: type[kfgn.errors.KfgnError]
    message: str  # a regular expression


BatchError, LossError, ModelError = (
    kfgn.errors.BatchError,
    kfgn.errors.LossError,
    kfgn.errors.ModelError,
)
marquardt = kfgn.transforms.LevenbergMarquardt
OptionError, ParameterError = kfgn.errors.OptionError, kfgn.errors.ParameterError

FAILED_MODEL = r"model failed with {}: [\s\S]*params {}[\s\S]*inputs \(1, 4\); check"

CASES = {
    # Parameters that are not the objective's or the optimizer's.
    "kernel of another shape": Bad(
        lambda: compute(params=params_with(out__kernel=jnp.ones((4, CLASSES)))),
        ModelError,
        FAILED_MODEL.format("TypeError", r".*out/kernel \(4, 3\)"),
    ),
    "leaf missing": Bad(
        lambda: kfra(params=params_with(out__bias=None)),
        ModelError,
        FAILED_MODEL.format("KeyError", "hidden/bias"),
    ),
    "integer parameters": Bad(
        lambda: compute(params=params_with(out__bias=jnp.zeros(CLASSES, int))),
        ParameterError,
        "'out/bias' must be a floating-point array, found dtype int32; keep counters",
    ),
    "Python number as parameter": Bad(
        lambda: compute(params={**PARAMS, "scale": 2.0}),
        ParameterError,
        "'scale' must be a floating-point array, found a float",
    ),
    "empty params": Bad(
        lambda: compute(params={}), ParameterError, "no leaves: expected a pytree of floating"
    ),
    "init of another shape": Bad(
        lambda: kfra().init(params_with(out__kernel=jnp.ones((4, CLASSES)))),
        ParameterError,
        r"'out/kernel' has shape \(4, 3\), .* made for shape \(6, 3\); make it from these params",
    ),
    "init of more leaves": Bad(
        lambda: kfra().init(params_with(out__scale=jnp.ones(3))),
        ParameterError,
        "'out/scale' is unknown to the objective .* 'out/kernel'; make the optimizer from these",
    ),
    "init of another model": Bad(
        lambda: kronecker().init({"w": jnp.ones(3)}), ParameterError, "'w' is unknown"
    ),
    "gradients of fewer layers": Bad(
        lambda: update(kfra(), {"out": good()[0]["out"]}),
        ParameterError,
        r"gradients of \['out'\], but init saw \['hidden', 'out'\]; initialize",
    ),
    "state of another optimizer": Bad(
        lambda: update(kronecker(), state=optax.adam(0.1).init(PARAMS)[0]),
        OptionError,
        "state must be a ScaleByKroneckerState, found a ScaleByAdamState: pass the one",
    ),
    "momentum turned on in mid-run": Bad(
        lambda: update(kfra(), state=kfra(momentum=False).init(PARAMS)),
        OptionError,
        "ScaleByCurvatureState was made with other options, such as momentum .* new state",
    ),
    "inverse changed in mid-run": Bad(
        lambda: update(kfra(), state=kfra(inverse="eigen").init(PARAMS)),
        OptionError,
        "made with other options, such as momentum or inverse",
    ),
    "state of another optimizer in a chain": Bad(
        lambda: update(kfra(), state=optax.adam(0.1).init(PARAMS)),
        OptionError,
        "state must be a ScaleByCurvatureState, found a ScaleByAdamState",
    ),
    "state of another optimizer, quadratic": Bad(
        lambda: update(kfgn.transforms.scale_by_quadratic_model(), state=optax.EmptyState()),
        OptionError,
        "state must be a ScaleByQuadraticModelState, found a EmptyState",
    ),
    "mask splits a layer": Bad(
        lambda: optax.masked(kfra(), mixed_mask).init(PARAMS),
        ParameterError,
        "'hidden' is split: 'hidden/kernel' is .* 'hidden/bias' is masked .* select whole layers",
    ),
    "average_parameters without params": Bad(
        lambda: kfgn.transforms.average_parameters().update(
            PARAMS, kfgn.transforms.average_parameters().init(PARAMS)
        ),
        OptionError,
        r"needs params: call update\(grads, state, params\)",
    ),
    # Batches.
    "sizes differ": Bad(
        lambda: compute(batch=(INPUT, LABELS[:5])),
        BatchError,
        "differ in their number of examples: inputs has 8, targets has 5",
    ),
    "sizes differ in the factory": Bad(
        lambda: kfra(batch=(INPUT[:3], LABELS)), BatchError, "inputs has 3, targets has 8"
    ),
    "empty batch": Bad(
        lambda: compute(batch=(INPUT[:0], LABELS[:0])), BatchError, "empty: expected at least one"
    ),
    "inputs alone": Bad(
        lambda: compute(batch=INPUT),
        BatchError,
        r"expected batch = \(inputs, targets\) or .*, found a ArrayImpl; for an autoencoder pass",
    ),
    "four members": Bad(
        lambda: compute(batch=(INPUT, LABELS, LABELS, LABELS)),
        BatchError,
        "found a tuple of length 4",
    ),
    "dictionary": Bad(
        lambda: kfra(batch={"inputs": INPUT, "targets": LABELS}), BatchError, "found a dict"
    ),
    "scalar targets": Bad(
        lambda: compute(batch=(INPUT, 1.0)),
        BatchError,
        r"targets is a scalar \(a float\); expected an array with a leading batch axis",
    ),
    "no inputs": Bad(lambda: compute(batch=(None, LABELS)), BatchError, "has no inputs: expected"),
    # Targets outside the loss's domain, where their values are known.
    "gray levels": Bad(
        lambda: compute(
            objective(loss=kfgn.losses.sigmoid_binary_cross_entropy), batch=(INPUT, 255 * TARGETS)
        ),
        LossError,
        r"must lie in \[0, 1\], found values from 85 to 85; rescale them \(.* divide by 255\)",
    ),
    "gray levels in the factory, from numpy": Bad(
        lambda: kfra(
            objective(loss=kfgn.losses.sigmoid_binary_cross_entropy),
            batch=(INPUT, np.asarray(255 * TARGETS)),
        ),
        LossError,
        "divide by 255",
    ),
    "label too large": Bad(
        lambda: compute(batch=(INPUT, LABELS + 1)),
        LossError,
        r"class indices in \[0, 2\], found 1 to 3; check the number of outputs",
    ),
    "label negative": Bad(
        lambda: compute(batch=(INPUT, LABELS - 1)), LossError, r"\[0, 2\], found -1 to 1"
    ),
    "labels as floats": Bad(
        lambda: compute(batch=(INPUT, LABELS.astype(jnp.float32))),
        LossError,
        "must be integer class indices, found dtype float32; for distributions use softmax_cross",
    ),
    "no distribution": Bad(
        lambda: compute(
            objective(loss=kfgn.losses.softmax_cross_entropy), batch=(INPUT, 2 * TARGETS)
        ),
        LossError,
        "must be a distribution over the 3 classes .*, found sums from 2 to 2; use one-hot vectors",
    ),
    "negative probability": Bad(
        lambda: compute(
            objective(loss=kfgn.losses.softmax_cross_entropy),
            batch=(INPUT, jnp.tile(jnp.array([-1.0, 1.0, 1.0]), (COUNT, 1))),
        ),
        LossError,
        "non-negative",
    ),
    # Outputs that do not fit.
    "one-hot for indices": Bad(
        lambda: compute(batch=(INPUT, TARGETS)),
        LossError,
        r"has outputs of shape \(3,\), so its target must have shape \(\), found \(3,\); check",
    ),
    "targets of another size": Bad(
        lambda: kfra(objective(loss=kfgn.losses.half_squared_error), batch=(INPUT, TARGETS[:, :2])),
        LossError,
        r"target must have shape \(3,\), found \(2,\)",
    ),
    "several outputs": Bad(
        lambda: compute(objective(lambda p, x: (network(p, x),) * 2)),
        LossError,
        "takes a single array of outputs, found a tuple; use kfgn.losses.from_function",
    ),
    "batch axis lost": Bad(
        lambda: compute(objective(lambda p, x: jnp.mean(network(p, x), axis=0))),
        ModelError,
        r"batch of one example .* output of shape \(3,\); expected a leading batch axis of 1",
    ),
    "scalar output": Bad(
        lambda: kfra(objective(lambda p, x: jnp.sum(network(p, x)))),
        ModelError,
        r"output of shape \(\); expected a leading batch axis",
    ),
    "no output": Bad(
        lambda: compute(objective(lambda p, x: None)), ModelError, "returned no outputs; expected"
    ),
    "model of one argument": Bad(
        lambda: compute(objective(lambda p: p)),
        ModelError,
        r"TypeError: .*1 positional argument but 2[\s\S]*called as model\(params, inputs\)",
    ),
    "flax module for its apply": Bad(
        lambda: compute(objective(nn.Dense(3))), ModelError, "for a flax module pass model.apply"
    ),
    # Arguments.
    "no curvature": Bad(
        lambda: update(kfra(), curvature=None),
        OptionError,
        r"needs the curvature .*value_grad_and_curvature\(.* curvature=curvature",
    ),
    "gradients as curvature": Bad(
        lambda: update(kronecker(), curvature=good()[0]),
        OptionError,
        "must be a kfgn.Curvature, found a dict; pass what",
    ),
    "curvature of another objective": Bad(
        lambda: update(kfra(), curvature=other_curvature()),
        ParameterError,
        "no factors for layer.* 'hidden', 'out': it was computed for another objective",
    ),
    "curvature of another objective, quadratic": Bad(
        lambda: update(kfgn.transforms.scale_by_quadratic_model(), curvature=other_curvature()),
        ParameterError,
        r"'hidden/bias' of shape \(6,\), for which the curvature has none: .* compute it at",
    ),
    "curvature of other shapes": Bad(
        lambda: update(kfra(), curvature=wider_curvature()),
        ParameterError,
        r"'hidden/bias' of shape \(6,\), for which the curvature has shape \(7,\)",
    ),
    "objective is the model": Bad(
        lambda: kfra(network),
        OptionError,
        r"must be a kfgn.Objective, found a function; make one with kfgn.Objective\(model, loss\)",
    ),
    "blocks are the objective": Bad(
        lambda: kfgn.transforms.scale_by_kronecker(OBJECTIVE),
        OptionError,
        r"what kfgn.layers.find_blocks\(objective, params, batch\) returned, found a Objective",
    ),
    "model is no function": Bad(
        lambda: objective(None), OptionError, "must be a function .*NoneType.*; pass model.apply"
    ),
    "unknown method": Bad(
        lambda: compute(method="ekfac"), OptionError, "'ekfac': expected one of kfra, kflr, kfac"
    ),
    "kfac without a key": Bad(
        lambda: compute(method="kfac"),
        OptionError,
        r"needs a random key: call it as curvature_fn\(params, batch, key=jax.random.key\(0\)\)",
    ),
    "key for kfra": Bad(
        lambda: compute(key=jax.random.key(0)), OptionError, "'kfra' draws nothing: .* without key="
    ),
    "no samples": Bad(
        lambda: compute(method="kfac", samples=0), OptionError, "samples .* at least 1, found 0"
    ),
    "unknown unassigned": Bad(
        lambda: compute(unassigned="skip"),
        OptionError,
        "must be one of block, raise, diagonal, gradient, found 'skip",
    ),
    # What curvature and optimizer must agree on.
    "curvature of another method": Bad(
        lambda: update(kfgn.kfac(OBJECTIVE, PARAMS, BATCH)),
        OptionError,
        "optimizer was made with method='kfac', the curvature with method='kfra': tell",
    ),
    "curvature of another l2": Bad(
        lambda: update(kfra(), curvature=compute(objective(l2=0.5))[1]),
        OptionError,
        "made with l2=0.001, the curvature with l2=0.5: .* the same objective",
    ),
    "curvature of another treatment": Bad(
        lambda: update(kfra(unassigned="gradient")),
        OptionError,
        "made with unassigned='gradient', the curvature with unassigned='block'",
    ),
    "curvature of another l2, conjugate gradients": Bad(
        lambda: update(kfgn.transforms.scale_by_conjugate_gradient(objective(l2=0.5))),
        OptionError,
        "made with l2=0.5, the curvature with l2=0.001",
    ),
    "no diagonals": Bad(
        lambda: without_diagonals(),
        ParameterError,
        "nothing for parameter.* 'norm/scale'.* pass the same to kfgn.value_grad",
    ),
    # Losses.
    "vector loss": Bad(
        lambda: compute(objective(loss=lambda o, t: o)),
        LossError,
        r"must return a scalar for one example, but returned \(3,\); sum it over the outputs",
    ),
    "loss of one argument": Bad(
        lambda: kfra(objective(loss=lambda o: jnp.sum(o))),
        LossError,
        r"failed with TypeError[\s\S]*as loss\(outputs, target\) on one example, .*shape=\(3,\)",
    ),
    "loss by name": Bad(
        lambda: objective(loss="mse"),
        LossError,
        r"expected a function \(outputs, target\) .* 'str'",
    ),
    # Options out of range.
    "unknown inverse": Bad(
        lambda: kfra(inverse="lu"),
        OptionError,
        "eigen, ekfac, two-term, found 'lu'",
    ),
    "no examples for the quadratic model": Bad(
        lambda: kfgn.value_grad_and_curvature(OBJECTIVE, model_examples=0),
        OptionError,
        "model_examples must be a whole number of at least 1, found 0",
    ),
    "spatial for another method": Bad(
        lambda: kfgn.value_grad_and_curvature(OBJECTIVE, "kflr", spatial="homogeneous"),
        OptionError,
        "spatial is an option of method \"kfra\", not of 'kflr'",
    ),
    "unknown inverse, kronecker": Bad(
        lambda: kronecker(inverse="lu"),
        OptionError,
        "eigen, ekfac, two-term, found 'lu'",
    ),
    "negative l2": Bad(
        lambda: objective(l2=-1.0), OptionError, "l2 must be finite and at least 0, found -1.0"
    ),
    "negative damping": Bad(
        lambda: kronecker(-0.1), OptionError, "damping must be positive and finite, found -0.1"
    ),
    "numpy's negative damping": Bad(
        lambda: kronecker(np.float32(-1)), OptionError, "damping must be positive"
    ),
    "infinite damping": Bad(lambda: kronecker(float("inf")), OptionError, "finite, found inf"),
    "damping as text": Bad(lambda: kronecker("0.1"), OptionError, "positive .* found '0.1'"),
    "damping as schedule": Bad(
        lambda: kronecker(optax.constant_schedule(0.1)),
        OptionError,
        "found a function; wrap .* optax.inject_hyperparams",
    ),
    "negative damping, quadratic": Bad(
        lambda: kfgn.transforms.scale_by_quadratic_model(-1.0),
        OptionError,
        "at least 0, found -1.0",
    ),
    "decay of 1": Bad(
        lambda: kfra(decay=1), OptionError, r"decay must be in \[0, 1\), or None .*, found 1"
    ),
    "average decay of 1": Bad(lambda: kfra(average_decay=1.0), OptionError, r"in \[0, 1\)"),
    "momentum as a number": Bad(
        lambda: kfra(momentum=0.9), OptionError, "momentum must be True or False, found 0.9"
    ),
    "start outside bounds": Bad(
        lambda: kfra(factor_damping=1e9),
        OptionError,
        r"factor_damping must start within its bounds.* initial 1000000000.0, maximum",
    ),
    "bounds inverted": Bad(
        lambda: kfra(step_damping=marquardt(1.0, 2.0, 0.5)),
        OptionError,
        r"step_damping must start within its bounds.* minimum 2.0, initial 1.0, maximum 0.5",
    ),
    "γ of 0": Bad(
        lambda: kfra(factor_damping=kfgn.transforms.Greedy(0.0, 0.0, 1.0)),
        OptionError,
        "factor_damping.* needs a positive minimum: factors may be singular; found 0.0",
    ),
    "γ fixed at 0": Bad(
        lambda: kfra(factor_damping=kfgn.transforms.Fixed(0.0)),
        OptionError,
        "factor_damping.* needs a positive minimum",
    ),
    "γ follows τ to 0": Bad(
        lambda: kfra(step_damping=marquardt(1.0, 0.0)),
        OptionError,
        "the step_damping that it follows, needs a positive minimum",
    ),
    "negative start": Bad(
        lambda: kfra(step_damping=-1.0), OptionError, "step_damping must be finite and at least 0"
    ),
    "rule of the other damping": Bad(
        lambda: kfra(step_damping=kfgn.transforms.Greedy(1.0)),
        OptionError,
        r"step_damping must be a number or a kfgn.transforms.StepDamping, found Greedy\(",
    ),
    "rule of the other damping, γ": Bad(
        lambda: kfgn.transforms.scale_by_curvature(blocks(), factor_damping=marquardt(1.0)),
        OptionError,
        "factor_damping must be a number or a kfgn.transforms.FactorDamping, found Levenberg",
    ),
    "damping decay above 1": Bad(
        lambda: kfra(step_damping=marquardt(1.0, decay=1.5)),
        OptionError,
        "step_damping: decay must be between 0 and 1, found 1.5",
    ),
    "thresholds inverted": Bad(
        lambda: kfra(step_damping=marquardt(1.0, thresholds=(0.75, 0.25))),
        OptionError,
        r"step_damping: thresholds .* low <= high, found \(0.75",
    ),
    "one threshold": Bad(
        lambda: kfra(step_damping=marquardt(1.0, thresholds=0.75)),
        OptionError,
        "thresholds must be a pair",
    ),
    "inversion period of 0": Bad(
        lambda: kfra(refresh_inverse_every=0),
        OptionError,
        "refresh_inverse_every must be a whole number of at least 1, found 0",
    ),
    "fractional period": Bad(
        lambda: kfra(step_damping=marquardt(1.0, period=2.5)),
        OptionError,
        "step_damping: period must be a whole number .* 2.5",
    ),
    "negative period": Bad(
        lambda: kfra(factor_damping=kfgn.transforms.Greedy(1.0, period=-1)),
        OptionError,
        "factor_damping: period .*whole number of at least 0, found -1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    case = CASES[name]
    with pytest.raises(case.error, match=case.message) as raised:
        case.act()
    assert type(raised.value) is case.error and isinstance(raised.value, ValueError)


def test_unknown_options_are_python_errors():
    for alias in (kfgn.kfra, kfgn.kflr, kfgn.kfac):
        with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
            alias(OBJECTIVE, PARAMS, BATCH, lr=0.1)


def test_model_error_keeps_its_cause():
    with pytest.raises(ModelError) as raised:
        compute(params=params_with(out__bias=None))
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("name", WITHOUT_BLOCK)
@pytest.mark.parametrize("act", [kfra, compute], ids=["optimizer", "curvature"])
def test_parameter_without_block_is_named(act, name):
    model, params, parameter, reason = WITHOUT_BLOCK[name]
    message = rf"'{parameter}' .*{reason}[\s\S]*unassigned=\"gradient\""
    with pytest.raises(kfgn.errors.LayerError, match=message):
        act(objective(model), params, unassigned="raise")


@pytest.mark.parametrize("name", WITHOUT_BLOCK)
def test_parameter_without_block_trains_if_asked_to(name):
    model, params, parameter, _ = WITHOUT_BLOCK[name]
    of = objective(model, l2=1e-3)
    tx = kfra(of, params, unassigned="gradient")
    curvature_fn = kfgn.value_grad_and_curvature(of, unassigned="gradient")

    @jax.jit
    def step(params, state):
        (loss, grads), curvature = curvature_fn(params, BATCH)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    trained, state, losses = params, tx.init(params), []
    for _ in range(10):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    leaves = [dict(named(tree))[parameter] for tree in (params, trained)]
    assert jnp.any(leaves[0] != leaves[1])


def named(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def test_shapes_are_checked_under_jit_and_values_are_let_through():
    curvature_fn = kfgn.value_grad_and_curvature(OBJECTIVE)
    with pytest.raises(BatchError, match="inputs has 8, targets has 5"):
        jax.eval_shape(curvature_fn, PARAMS, (INPUT, LABELS[:5]))
    jax.eval_shape(curvature_fn, PARAMS, (INPUT, LABELS + 1))  # no one can know there
    jax.eval_shape(lambda batch: kfra(batch=batch).init(PARAMS), (INPUT, LABELS + 1))
