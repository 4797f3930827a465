"""Dense truth: every matrix by jax.hessian and jax.jacobian of the user's own functions.

Nothing of kfgn is used here. All parameters are one vector; the Hessian and the
Jacobian of every example in it are formed whole, and blocks are read off by index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.tables.losses import LossRow
from tests.tables.nets import Case


class Truth(NamedTuple):
    """One batch; P parameters, a bias for every layer among them, K outputs."""

    value: np.ndarray
    losses: np.ndarray  # `[N]`
    gradient: np.ndarray  # of the mean loss, `[P]`
    gradients: np.ndarray  # of each example, `[N, P]`
    hessian: np.ndarray  # of each example, `[N, P, P]`
    output_hessian: np.ndarray  # of each example, semi-definite, `[N, K, K]`
    jacobian: np.ndarray  # of each example's outputs, `[N, K, P]`

    @property
    def gauss_newton(self) -> np.ndarray:
        """`J'HJ` of each example, `[N, P, P]`."""
        return np.einsum("nkp,nkl,nlq->npq", self.jacobian, self.output_hessian, self.jacobian)

    @property
    def empirical_fisher(self) -> np.ndarray:
        """The outer product of each example's gradient, `[N, P, P]`."""
        return np.einsum("np,nq->npq", self.gradients, self.gradients)


class Index(NamedTuple):
    """Where a layer is in the vector of all parameters."""

    pre_activation: np.ndarray  # `[d_out]`, the bias
    block: np.ndarray  # `[d_in (+ 1), d_out]`, the layer's own parameters only


def dense_truth(case: Case, row: LossRow, targets: Any) -> Truth:
    """All of it, for one batch."""

    @jax.jit
    def everything(params, inputs, targets):
        flat, unravel = ravel_pytree(params)

        def outputs_of(p, x):
            outputs = case.model(unravel(p), jax.tree.map(lambda a: a[None], x))
            return jax.tree.map(lambda a: a[0], outputs)

        def loss_of(p, x, y):
            return row.reference(outputs_of(p, x), y)

        def mean_loss(p):
            return jnp.mean(jax.vmap(row.reference)(case.model(unravel(p), inputs), targets))

        def one(x, y):
            outputs, as_outputs = ravel_pytree(outputs_of(flat, x))
            curvature = jax.hessian(lambda o: row.reference(as_outputs(o), y))(outputs)
            return (
                loss_of(flat, x, y),
                jax.grad(loss_of)(flat, x, y),
                jax.hessian(loss_of)(flat, x, y),
                curvature if row.convex else _semi_definite(curvature),
                jax.jacobian(lambda p: ravel_pytree(outputs_of(p, x))[0])(flat),
            )

        value, gradient = jax.value_and_grad(mean_loss)(flat)
        losses, gradients, hessian, output_hessian, jacobian = jax.vmap(one)(inputs, targets)
        return Truth(value, losses, gradient, gradients, hessian, output_hessian, jacobian)

    return jax.tree.map(np.asarray, everything(case.perturbable(), case.inputs, targets))


def _semi_definite(matrix):
    values, vectors = jnp.linalg.eigh(matrix)
    return (vectors * jnp.clip(values, min=0)) @ vectors.T


def indices(case: Case) -> dict[str, Index]:
    """The index of every layer, by its name in kfgn."""
    places = _places(case.perturbable())
    own = _places(case.params)
    result = {}
    for name, slot in case.slots.items():
        bias = places[slot.bias].ravel()
        block = slot.to_matrix(places[slot.kernel])
        if slot.bias in own:
            block = np.concatenate([block, bias[None]])
        result[name] = Index(bias, block)
    return result


def own_entries(case: Case) -> np.ndarray:
    """The places of the model's own parameters in the vector, in flattening order."""
    places = _places(case.perturbable())
    return np.concatenate([places[path].ravel() for path in _places(case.params)])


def _places(params: Any) -> dict[str, np.ndarray]:
    """By path, the places of each leaf's entries in the raveled parameters."""
    result, start = {}, 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # nnx reaches the array of a variable through an attribute `value`.
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        result[name] = np.arange(start, start + leaf.size).reshape(leaf.shape)
        start += leaf.size
    return result


def submatrix(matrix: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows and columns at an index, of the last two axes."""
    flat = index.ravel()
    return matrix[..., flat[:, None], flat[None, :]]
