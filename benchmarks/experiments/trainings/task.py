"""What one training is: an objective, where it starts, and the batches it sees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from kfgn.objective.sum_of import AnyObjective


class Task(NamedTuple):
    """One training; `draw` and `evaluate` are jitted by whoever trains."""

    objective: AnyObjective
    params: Any
    draw: Callable[[jax.Array, Any], Any]  # a batch from a key, at these parameters
    evaluate: Callable[[Any], jax.Array]  # what is to be small, of the parameters
    figure: str = "training loss"


def of_data(
    objective: AnyObjective,
    params: Any,
    data: Any,
    size: int,
    rows: Callable[[Any, jax.Array], Any] = lambda batch, key: batch,
) -> Task:
    """Batches of `size` random rows of arrays; `rows(batch, key)` adds what each draw has anew.

    Of many rows one may be drawn twice: to see that none is sorts all, which takes longer than
    an update.
    """
    count = len(jax.tree.leaves(data)[0])

    def draw(key: jax.Array, params: Any) -> Any:
        chosen, own = jax.random.split(key)
        picked = jax.random.choice(chosen, count, (size,), replace=size < count // 16)
        return rows(jax.tree.map(lambda a: a[picked], data), own)

    whole = rows(data, jax.random.key(9))
    return Task(objective, params, draw, lambda params: objective.mean_loss(params, whole))


def started(module: nn.Module, inputs: Any, seed: int) -> Any:
    """Initial parameters, from an example of the inputs."""
    first = jax.tree.map(lambda a: a[:1], inputs)
    return jax.jit(module.init)(jax.random.key(seed), first)
