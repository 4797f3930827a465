"""What a training example does to the loss of another, without training again."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.linalg import map_examples, total
from kfgn.base.trees import batch_of, named_leaves
from kfgn.base.types import Array, Batch, PyTree
from kfgn.objective.objective import Objective, read_batch
from kfgn.objective.sum_of import require_objective
from kfgn.posterior.gaussian import Posterior


def influence(
    posterior: Posterior,
    objective: Objective,
    training: Batch,
    test: Batch,
    *,
    chunk_size: int | None = 1,
) -> Float[Array, "n_test n_training"]:
    """The change of each test example's loss if a training example were left out.

    To first order it is `g_t' Σ g_n`, with the gradients g at θ* of the examples' losses
    and Σ in the place of the inverse Hessian of all of them (Koh and Liang 2017). Positive
    entries are of examples that help. Weights in the batches are not read.

    Args:
      posterior: of `kfgn.posterior.laplace`, at the trained parameters.
      chunk_size: training examples at once; the gradients of all test examples are held.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> batch = (jnp.ones((3, 1)), jnp.array([[0.0], [1.0], [2.0]]))
    >>> w = jnp.array([[1.0]])
    >>> posterior = kfgn.posterior.laplace(objective, w, batch, prior_precision=1e-6)
    >>> test = (jnp.ones((1, 1)), jnp.array([[2.0]]))
    >>> found = kfgn.posterior.influence(posterior, objective, batch, test)[0]
    >>> [round(x.item(), 2) + 0.0 for x in found]
    [-0.33, 0.0, 0.33]
    """
    require_objective(objective)
    precisions = posterior.precisions()

    def gradient(example: PyTree) -> dict[str, Array]:
        found = jax.grad(objective.mean_loss)(posterior.mean, batch_of(example))
        return posterior.turned(named_leaves(found))

    scaled = jax.tree.map(
        lambda g, p: g / p, map_examples(gradient, read_batch(objective, test[:2])), precisions
    )

    def of_one(example: PyTree) -> Float[Array, " n_test"]:
        own = gradient(example)
        return total(
            jnp.sum(scaled[name] * g, axis=tuple(range(1, g.ndim + 1))) for name, g in own.items()
        )

    return map_examples(of_one, read_batch(objective, training[:2]), chunk_size).T
