"""Accuracy, and the record that tells bias from variance.

    accuracy = (1/N) sum_n [y_n = predict(x_n)]     (eq. 30 of Veitch)

A model that is wrong on what it is trained on has bias; one that is right there
and wrong on other data has variance. One `BiasVariance` for every so many
iterations is the record of a training, to be plotted against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_chunk_size
from kfgn.base.errors import OptionError
from kfgn.base.linalg import count_of, factor_dtype, sum_over_examples
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.objective.objective import Objective, require_batch, require_objective

Correct = Callable[[PyTree, PyTree], Array]


class BiasVariance(NamedTuple):
    """Mean losses, without the penalty, and accuracies in [0, 1]; points may be stacked, `[S]`.

    >>> import kfgn
    >>> point = kfgn.diagnostics.BiasVariance(0.1, 0.75, 0.3, 0.5)
    >>> point.bias, point.variance
    (0.25, 0.25)
    """

    train_loss: Float[Array, "*S"]
    train_accuracy: Float[Array, "*S"]
    dev_loss: Float[Array, "*S"]
    dev_accuracy: Float[Array, "*S"]

    @property
    def bias(self) -> Float[Array, "*S"]:
        """The error on the data trained on, `1 - train_accuracy`."""
        return 1 - self.train_accuracy

    @property
    def variance(self) -> Float[Array, "*S"]:
        """By how much the error is larger on the other data; negative where it is smaller."""
        return self.train_accuracy - self.dev_accuracy


def accuracy(
    objective: Objective, *, correct: Correct | None = None, chunk_size: int | None = 1000
) -> Callable[[PyTree, Batch], Scalar]:
    """`(params, batch) -> scalar` in [0, 1]: the share of examples predicted correctly, eq. (30).

    An example with several labels counts by the share of them that are right;
    one whose outputs are not finite counts as wrong.

    Args:
      objective: the objective.
      correct: `(outputs, target) -> scalar` of one example, True or a share; None
        takes the loss's own: the largest logit for the softmax losses, the sign
        of each logit for sigmoid cross-entropy.
      chunk_size: examples that go through the model at once; None for all.

    Raises:
      LossError: the loss predicts no classes, and `correct` is not given.
      OptionError: an option has a wrong value.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: x @ p, kfgn.losses.softmax_cross_entropy)
    >>> batch = (jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> float(kfgn.diagnostics.accuracy(objective)(jnp.eye(2), batch))
    0.5
    """
    figures = _figures(objective, correct, chunk_size)
    return lambda params, batch: figures(params, batch)[1]


def bias_variance(
    objective: Objective, *, correct: Correct | None = None, chunk_size: int | None = 1000
) -> Callable[[PyTree, Batch, Batch], BiasVariance]:
    """`(params, train, dev) -> BiasVariance`: losses and accuracies on two sets of examples.

    The returned function can be jitted. Points of several iterations stack by
    `jax.tree.map(lambda *x: jnp.stack(x), *points)`.

    Args:
      objective, correct, chunk_size: as in `accuracy`.

    Raises:
      LossError, OptionError: as in `accuracy`.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: x @ p, kfgn.losses.softmax_cross_entropy)
    >>> train, dev = (jnp.eye(2), jnp.eye(2)), (jnp.eye(2), jnp.eye(2)[::-1])
    >>> found = kfgn.diagnostics.bias_variance(objective)(jnp.eye(2), train, dev)
    >>> float(found.bias), float(found.variance)
    (0.0, 1.0)
    """
    figures = _figures(objective, correct, chunk_size)

    def measure(params: PyTree, train: Batch, dev: Batch) -> BiasVariance:
        return BiasVariance(*figures(params, train), *figures(params, dev))

    return measure


def _figures(
    objective: Objective, correct: Correct | None, chunk_size: int | None
) -> Callable[[PyTree, Batch], list[Scalar]]:
    """`(params, batch) -> [mean loss, accuracy]`."""
    require_objective(objective)
    check_chunk_size(chunk_size)
    if correct is not None and not callable(correct):
        raise OptionError(
            f"correct must be callable as correct(outputs, target), found {correct!r}"
        )
    loss = objective.loss

    def figures_of_one(outputs: PyTree, target: PyTree) -> tuple[Scalar, Scalar]:
        return loss(outputs, target), _counted(correct or loss.correct, outputs, target)

    def figures(params: PyTree, batch: Batch) -> list[Scalar]:
        inputs, targets, shapes = require_batch(objective, params, batch)
        count = count_of(inputs)
        dtype = factor_dtype(*(leaf.dtype for leaf in jax.tree.leaves(shapes)))

        def sums(chunk: Batch) -> list[Scalar]:
            losses, hits = jax.vmap(figures_of_one)(objective.model(params, chunk[0]), chunk[1])
            labelled = ~jnp.isnan(hits)  # NaN where all labels of an example are ignored
            each = losses, jnp.where(labelled, hits, 0), labelled
            return [jnp.sum(x, dtype=dtype) for x in each]

        found = sum_over_examples(sums, (inputs, targets), chunk_size=chunk_size or count)
        return [found[0] / count, found[1] / found[2]]

    return figures


def _counted(correct: Correct, outputs: PyTree, target: PyTree) -> Scalar:
    """What an example counts: nothing where an output is NaN or no number is left to compare."""
    found = jnp.asarray(correct(outputs, target))
    if found.shape != ():
        raise OptionError(
            f"correct must return a scalar for one example, found shape {found.shape}; take the "
            "mean over an example's labels."
        )
    # Of -inf are the logits of masked classes.
    finite = [jnp.all(x < jnp.inf) & jnp.any(jnp.isfinite(x)) for x in jax.tree.leaves(outputs)]
    return jnp.where(jnp.all(jnp.stack(finite)), found.astype(jnp.float32), 0)
