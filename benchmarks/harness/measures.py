"""How a training went: accuracy, the record that tells bias from variance, iterations needed.

    accuracy = (1/N) sum_n [y_n = predict(x_n)]     (eq. 30 of Veitch)

A model that is wrong on what it is trained on has bias; one that is right there
and wrong on other data has variance. One `BiasVariance` for every so many
iterations is the record of a training, to be plotted against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kfgn
from kfgn.base.linalg import factor_dtype, sum_over_examples

Correct = Callable[[Any, Any], jax.Array]


class BiasVariance(NamedTuple):
    """Mean losses, without the penalty, and accuracies in [0, 1]; points may be stacked, `[S]`."""

    train_loss: jax.Array
    train_accuracy: jax.Array
    dev_loss: jax.Array
    dev_accuracy: jax.Array

    @property
    def bias(self) -> jax.Array:
        """The error on the data trained on, `1 - train_accuracy`."""
        return 1 - self.train_accuracy

    @property
    def variance(self) -> jax.Array:
        """By how much the error is larger on the other data; negative where it is smaller."""
        return self.train_accuracy - self.dev_accuracy


def accuracy(
    objective: kfgn.Objective, *, correct: Correct | None = None, chunk_size: int = 1000
) -> Callable[[Any, Any], jax.Array]:
    """`(params, batch) -> scalar` in [0, 1]: the share of examples predicted correctly, eq. (30).

    An example with several labels counts by the share of them that are right,
    one without any (all are ignored) not at all; one whose outputs are not
    finite counts as wrong.

    Args:
      objective: the objective.
      correct: `(outputs, target) -> scalar` of one example, True or a share; None
        takes the largest logit for the softmax losses, and the sign of each logit
        for sigmoid cross-entropy.
      chunk_size: examples that go through the model at once.
    """
    figures = _figures(objective, correct, chunk_size)
    return lambda params, batch: figures(params, batch)[1]


def bias_variance(
    objective: kfgn.Objective, *, correct: Correct | None = None, chunk_size: int = 1000
) -> Callable[[Any, Any, Any], BiasVariance]:
    """`(params, train, dev) -> BiasVariance`: losses and accuracies on two sets of examples."""
    figures = _figures(objective, correct, chunk_size)
    return lambda params, train, dev: BiasVariance(*figures(params, train), *figures(params, dev))


def _figures(
    objective: kfgn.Objective, correct: Correct | None, chunk_size: int
) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """`(params, batch) -> (mean loss, accuracy)`."""
    loss = objective.loss
    found = correct or _correct(loss)

    def counted(outputs: Any, target: Any) -> jax.Array:
        # Of -inf are the logits of masked classes; argmax names the place of a NaN.
        finite = [jnp.all(x < jnp.inf) & jnp.any(jnp.isfinite(x)) for x in jax.tree.leaves(outputs)]
        hit = jnp.asarray(found(outputs, target), jnp.float32)
        return jnp.where(jnp.all(jnp.stack(finite)), hit, 0)

    def figures(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def sums(chunk: Any) -> list[jax.Array]:
            outputs = objective.model(params, chunk[0])
            losses, hits = jax.vmap(loss)(outputs, chunk[1]), jax.vmap(counted)(outputs, chunk[1])
            labelled = ~jnp.isnan(hits)  # NaN where all labels of an example are ignored
            each = losses, jnp.where(labelled, hits, 0), labelled
            wide = factor_dtype(losses.dtype)
            return [jnp.sum(x, dtype=wide) for x in each]

        total, hits, labelled = sum_over_examples(sums, batch, chunk_size=chunk_size)
        return total / len(batch[1]), hits / labelled

    return figures


def _correct(loss: Any) -> Correct:
    """The share of an example's labels that are predicted; NaN where none counts."""
    if loss is kfgn.losses.sigmoid_binary_cross_entropy:
        return lambda outputs, target: jnp.mean((outputs > 0) == (target > 0.5))
    if not loss.name.startswith("softmax"):
        raise ValueError(f"the loss {loss.name!r} predicts no classes: pass correct=")

    def share(outputs: jax.Array, target: jax.Array) -> jax.Array:
        labels = target.astype(int) if loss.integer_labels else jnp.argmax(target, axis=-1)
        hits = jnp.argmax(outputs, axis=-1) == labels
        counted = loss.integer_labels and loss.ignore_index is not None
        return jnp.mean(hits, where=labels != loss.ignore_index if counted else None)

    return share


def iterations_to_tolerance(losses: Any, tolerance: float) -> int | None:
    """The first k with `|f(x_k) - f(x_{k-1})| <= tolerance`, eq. (29) of Veitch, or None.

    Args:
      losses: the values `[f(x_0), f(x_1), ...]`; a change that is not finite
        never counts.
      tolerance: ε, at least 0.
    """
    with np.errstate(invalid="ignore"):
        within = np.abs(np.diff(np.asarray(losses, np.float64))) <= tolerance
    return int(np.argmax(within)) + 1 if within.any() else None
