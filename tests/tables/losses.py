"""The table of losses: each beside a reference written from its definition alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfgn

Array = jax.Array


class LossRow(NamedTuple):
    """A loss of kfgn, what it must equal, and targets for a batch of outputs."""

    loss: kfgn.losses.Loss
    reference: Callable[[Any, Any], Array]  # (outputs, target) -> scalar, one example
    targets: Callable[[Array, Any], Any]  # (key, outputs of a batch) -> targets
    convex: bool = True


def _normal(key, outputs):
    return jax.random.normal(key, outputs.shape, outputs.dtype)


def _grey(key, outputs):
    return jax.random.uniform(key, outputs.shape, outputs.dtype)


def _labels(key, outputs):
    return jax.random.randint(key, outputs.shape[:-1], 0, outputs.shape[-1])


def _one_hot(key, outputs):
    return jax.nn.one_hot(_labels(key, outputs), outputs.shape[-1], dtype=outputs.dtype)


def _distribution(key, outputs):
    return jax.nn.softmax(2 * _normal(key, outputs))


def _squared(outputs, target):
    return 0.5 * jnp.sum((outputs - target) ** 2)


def _bernoulli(outputs, target):
    likely, unlikely = jax.nn.log_sigmoid(outputs), jax.nn.log_sigmoid(-outputs)
    return -jnp.sum(target * likely + (1 - target) * unlikely)


def _categorical(outputs, target):
    normalizer = jax.scipy.special.logsumexp(outputs, axis=-1, keepdims=True)
    return jnp.sum(target * (normalizer - outputs))


def _categorical_index(outputs, target):
    hot = jax.nn.one_hot(target, outputs.shape[-1], dtype=outputs.dtype)
    return _categorical(outputs, hot)


IGNORED = -100
WEIGHTS = (0.5, 2.0, 1.3)


def _some_labels(key, outputs):
    """Labels of which some are ignored."""
    labels = _labels(key, outputs)
    return jnp.where(jnp.arange(labels.size).reshape(labels.shape) % 3 == 1, IGNORED, labels)


def _counted(outputs, target):
    each = jnp.vectorize(_categorical_index, signature="(k),()->()")(outputs, target)
    return jnp.sum(jnp.where(target == IGNORED, 0.0, each))


def _smoothed(outputs, target):
    classes = outputs.shape[-1]
    return _categorical(outputs, 0.8 * target + 0.2 / classes)


def _weighted(outputs, target):
    logs = jax.nn.log_softmax(outputs)
    return -jnp.sum(jnp.asarray(WEIGHTS) * target * logs)


def _everything(outputs, target):
    """torch's nn.CrossEntropyLoss with all options, as its manual writes them."""
    w, logs = jnp.asarray(WEIGHTS), jax.nn.log_softmax(outputs)
    hot = jax.nn.one_hot(target, outputs.shape[-1], dtype=outputs.dtype)
    smooth = -0.1 / len(WEIGHTS) * jnp.sum(w * logs, axis=-1)
    return jnp.sum(
        jnp.where(target == IGNORED, 0.0, -0.9 * jnp.sum(w * hot * logs, axis=-1) + smooth)
    )


def _poisson(outputs, target):
    return jnp.sum(jnp.exp(outputs) - target * outputs)


def _counts(key, outputs):
    return jax.random.randint(key, outputs.shape, 0, 9).astype(outputs.dtype)


def _huber(outputs, target):
    error = jnp.abs(outputs - target)
    return jnp.sum(jnp.where(error <= 1.5, 0.5 * error**2, 1.5 * (error - 0.75)))


def _pinball(outputs, target):
    """The pinball loss with a parabola between its lines, that meets them in value and slope."""
    error, q, w = target - outputs, jnp.asarray((0.2, 0.5, 0.9)), 1.5
    line = jnp.where(error > q * w, q * (error - 0.5 * q * w), error**2 / (2 * w))
    low = (q - 1) * w
    return jnp.sum(jnp.where(error < low, (q - 1) * (error - 0.5 * low), line))


def _mask(key, outputs):
    """Targets of which some are missing."""
    keep = jnp.arange(outputs.size).reshape(outputs.shape) % 3 != 1
    return jnp.where(keep, _counts(key, outputs), jnp.nan), keep


def _masked_poisson(outputs, target):
    y = jnp.where(target[1], target[0], 0.0)
    return jnp.sum(jnp.where(target[1], jnp.exp(outputs) - y * outputs, 0.0))


def pseudo_huber(outputs, target):
    """Convex, with a Hessian that depends on the residual."""
    return jnp.sum(jnp.sqrt(1 + (outputs - target) ** 2) - 1)


def coupled(outputs, target):
    """Convex, with a full output Hessian; takes outputs of any tree."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(outputs)])
    return jax.scipy.special.logsumexp(flat) + 0.5 * jnp.sum((flat - target) ** 2)


def _coupled_targets(key, outputs):
    leaves = jax.tree.leaves(outputs)
    size = sum(math.prod(leaf.shape[1:]) for leaf in leaves)
    return jax.random.normal(key, (leaves[0].shape[0], size), leaves[0].dtype)


def mixture(outputs, target):
    """Two binary classifiers mixed by a third, eq. (27): not convex."""
    gate, first, second = outputs
    sign = 2 * target - 1
    one = jax.nn.log_sigmoid(gate) + jax.nn.log_sigmoid(sign * first)
    two = jax.nn.log_sigmoid(-gate) + jax.nn.log_sigmoid(sign * second)
    return -jnp.logaddexp(one, two)


def _mixture_sample(key, outputs):
    gate, first, second = jax.nn.sigmoid(outputs)
    return jax.random.bernoulli(key, gate * first + (1 - gate) * second).astype(outputs.dtype)


def _binary(key, outputs):
    return jax.random.bernoulli(key, 0.5, outputs.shape[:1]).astype(outputs.dtype)


def gaussian(outputs, target):
    """Mean and logarithm of the scale, in a dictionary: not convex in both together."""
    mean, log_scale = outputs["mean"], outputs["log_scale"]
    return jnp.sum(0.5 * ((target - mean) * jnp.exp(-log_scale)) ** 2 + log_scale)


def _gaussian_targets(key, outputs):
    return 2 * _normal(key, outputs["mean"])


LABELS = kfgn.losses.softmax_cross_entropy_with_integer_labels
LOSSES: dict[str, LossRow] = {
    "squared_error": LossRow(kfgn.losses.half_squared_error, _squared, _normal),
    "sigmoid": LossRow(kfgn.losses.sigmoid_binary_cross_entropy, _bernoulli, _grey),
    "one_hot": LossRow(kfgn.losses.softmax_cross_entropy, _categorical, _one_hot),
    "soft_labels": LossRow(kfgn.losses.softmax_cross_entropy, _categorical, _distribution),
    "integer_labels": LossRow(LABELS, _categorical_index, _labels),
    "pseudo_huber": LossRow(
        kfgn.losses.from_function(pseudo_huber, convex=True), pseudo_huber, _normal
    ),
    "unpromised": LossRow(  # convex, but kfgn is not told so
        kfgn.losses.from_function(coupled), coupled, _coupled_targets
    ),
    "coupled": LossRow(kfgn.losses.from_function(coupled, convex=True), coupled, _coupled_targets),
    "mixture": LossRow(
        kfgn.losses.from_function(mixture, sample=_mixture_sample), mixture, _binary, convex=False
    ),
    "gaussian": LossRow(
        kfgn.losses.from_function(gaussian), gaussian, _gaussian_targets, convex=False
    ),
}

# Held against their definitions only: models see of a loss no more than those above show.
MORE_LOSSES: dict[str, LossRow] = {
    "ignoring": LossRow(LABELS.with_options(ignore_index=IGNORED), _counted, _some_labels),
    "smoothed": LossRow(
        kfgn.losses.softmax_cross_entropy.with_options(label_smoothing=0.2), _smoothed, _one_hot
    ),
    "weighted": LossRow(
        kfgn.losses.softmax_cross_entropy.with_options(class_weights=WEIGHTS),
        _weighted,
        _distribution,
    ),
    "all_options": LossRow(
        LABELS.with_options(ignore_index=IGNORED, class_weights=WEIGHTS, label_smoothing=0.1),
        _everything,
        _some_labels,
    ),
    "poisson": LossRow(kfgn.losses.poisson_negative_log_likelihood, _poisson, _counts),
    "huber": LossRow(kfgn.losses.huber(1.5), _huber, _normal),
    "quantile": LossRow(kfgn.losses.quantile((0.2, 0.5, 0.9), 1.5), _pinball, _normal),
    "masked": LossRow(
        kfgn.losses.masked(kfgn.losses.poisson_negative_log_likelihood), _masked_poisson, _mask
    ),
}
