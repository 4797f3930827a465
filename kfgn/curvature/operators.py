"""The exact matrices of an objective as operators: Hessian, Gauss-Newton, empirical Fisher.

With J_n the Jacobian of example n's K outputs o in all P parameters, the three are

    A = (1/N) sum_n (J_n' B_n J_n  [+ sum_k (dE_n / do_k) (d²o_nk / dθ²)])  (+ l2 I),

and differ in the matrix B_n `[K, K]` in the outputs: the Hessian has the loss's own,
Gauss-Newton its positive semi-definite part, and the empirical Fisher matrix `g_n g_n'`
of the gradient `g_n = dE_n / do`. The Hessian alone has the second-order terms.

    kfgn.hessian(objective).matvec(params, batch, v)

All are of the mean per-example loss, without the penalty unless `with_l2` asks for it.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Int

from kfgn.base.checks import check_chunk_size, check_not_negative, check_size
from kfgn.base.linalg import count_of, factor_dtype, map_examples, matmul, mean_of_examples
from kfgn.base.trees import batch_of, first_of, named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree, Scalar
from kfgn.curvature.blocks import blocks_of
from kfgn.curvature.forward_pass import as_outputs, linearize
from kfgn.curvature.linear_pass import linear_pass, only_backwards
from kfgn.curvature.operator import REMEDY, Operator, dtype_of, size_of, verb, width_of
from kfgn.curvature.operator_sum import OperatorSum
from kfgn.curvature.per_example import Prepared, prepare, single_diagonal
from kfgn.model.graph.build_graph import build_graph
from kfgn.objective.loss import flatten_batch
from kfgn.objective.objective import check_outputs, read_batch, require_batch
from kfgn.objective.sum_of import AnyObjective, SumOfObjectives
from kfgn.objective.weights import rooted

Kind = TypeVar("Kind", bound=Operator)

_ROWS = 16  # rows of a dense Hessian that are worked on at once


class Hessian(Operator):
    """The Hessian of the mean loss; see `Operator` for its verbs."""

    of = "Hessian"

    def _matrix(self, outputs: PyTree, target: PyTree) -> Float[Array, "K K"]:
        return self._loss(target).hessian(outputs, target)

    def _prepare(self, params: PyTree, batch: Batch, **options: Any) -> Prepared:
        return prepare(self.objective, params, batch, self._matrix, second_order=True, **options)

    def _linear(self, params: PyTree, batch: Batch) -> Callable[[PyTree], PyTree]:
        gradient = jax.grad(lambda p: self.objective.mean_loss(p, batch))
        if only_backwards(gradient, params):  # a backward pass that holds a `custom_vjp` itself
            pull = jax.vjp(gradient, params)[1]
            return lambda v: pull(v)[0]
        return lambda v: jax.jvp(gradient, (params,), (v,))[1]

    def _dense(self, params: PyTree, batch: Batch, dtype: Any) -> Float[Array, "P P"]:
        flat, unravel = ravel_pytree(_astype(params, dtype))

        def mean_loss(x: Float[Array, " P"]) -> Scalar:
            own = jax.tree.map(lambda a, p: a.astype(jnp.result_type(p)), unravel(x), params)
            return self.objective.mean_loss(own, batch)

        gradient = jax.grad(mean_loss)
        if only_backwards(gradient, flat):
            pull = jax.vjp(gradient, flat)[1]
            return map_examples(lambda v: pull(v)[0], jnp.eye(flat.size, dtype=dtype), _ROWS)
        _, push = jax.linearize(gradient, flat)
        return map_examples(push, jnp.eye(flat.size, dtype=dtype), _ROWS).T


class GaussNewton(Operator):
    """The Gauss-Newton matrix of the mean loss; see `Operator` for its other verbs."""

    of = "Gauss-Newton matrix"

    @verb
    def jacobian(self, params: PyTree, batch: Batch) -> Float[Array, "N K P"]:
        """J: each example's outputs in all parameters, an example at a time; no weights."""
        _, _, outputs = require_batch(self.objective, params, batch)
        inputs = jax.tree.map(jnp.asarray, batch[0])
        dtype = dtype_of(params, outputs)
        shape = (count_of(inputs), width_of(outputs), size_of(params))
        check_size("the Jacobian of the outputs", shape, dtype, REMEDY)
        return map_examples(lambda x: self._jacobian(params, x, dtype)[1], inputs)

    @verb
    def rank(
        self, params: PyTree, batch: Batch, *, tolerance: float | None = None
    ) -> Int[Array, ""]:
        """The rank of the batch's matrix, without l2.

        With C_n C_n' = B_n, it is the rank of the rows `C_n' J_n` of all examples,
        `[N R, P]`, and so at most N times the rank of B (appendix E, eq. 63). The
        singular values of the rows are those of A before squaring, which keeps twice
        the digits. They count where they exceed `tolerance` times the largest; None
        stands for the rounding unit times the larger side.
        """
        if tolerance is not None:
            check_not_negative("tolerance", tolerance)
        inputs, targets, outputs = require_batch(self.objective, params, batch)
        dtype, size = dtype_of(params, outputs), size_of(params)
        check_size("the rows", (count_of(inputs), width_of(outputs), size), dtype, REMEDY)

        def one(example: Batch) -> Float[Array, "R P"]:
            output, jacobian = self._jacobian(params, example[0], dtype)
            return matmul(self._root(output, example[1]).astype(dtype).T, jacobian)

        rows = map_examples(one, (inputs, targets)).reshape(-1, size)
        values = jnp.linalg.svd(rows, compute_uv=False)
        relative = max(rows.shape) * jnp.finfo(dtype).eps if tolerance is None else tolerance
        return jnp.sum(values > relative * jnp.max(values, initial=0))

    def _matrix(self, outputs: PyTree, target: PyTree) -> Float[Array, "K K"]:
        return self._loss(target).gauss_newton_hessian(outputs, target)

    def _root(self, outputs: PyTree, target: PyTree) -> Float[Array, "K R"]:
        """C, with `C C' = B`, or -B where the weight is negative."""
        return self._loss(target).hessian_sqrt(outputs, target)

    def _times(
        self, outputs: PyTree, target: PyTree, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        """`B vector`."""
        return self._loss(target).gauss_newton_product(outputs, target, vector)

    def _linear(self, params: PyTree, batch: Batch) -> Callable[[PyTree], PyTree]:
        inputs, targets = read_batch(self.objective, batch)
        outputs, push, pull = linear_pass(self.objective.outputs, params, inputs)
        check_outputs(self._loss(targets), outputs, inputs, targets)

        def product(v: PyTree) -> PyTree:
            curved = jax.vmap(self._times)(outputs, targets, flatten_batch(push(v)))
            return pull(as_outputs(curved / count_of(inputs), outputs))

        return product

    def _dense(self, params: PyTree, batch: Batch, dtype: Any) -> Float[Array, "P P"]:
        def one(example: Batch) -> Float[Array, "P P"]:
            output, jacobian = self._jacobian(params, example[0], dtype)
            matrix = self._matrix(output, example[1]).astype(dtype)
            return matmul(jacobian.T, matmul(matrix, jacobian))

        return mean_of_examples(one, read_batch(self.objective, batch))

    def _jacobian(
        self, params: PyTree, example: PyTree, dtype: Any
    ) -> tuple[PyTree, Float[Array, "K P"]]:
        """One example's outputs, and their Jacobian by a backward pass for each."""
        alone = batch_of(example)
        outputs, pull = jax.vjp(lambda p: self.objective.outputs(p, alone), params)

        def row(cotangent: Float[Array, " K"]) -> Float[Array, " P"]:
            (found,) = pull(as_outputs(cotangent[None], outputs))
            return ravel_pytree(_astype(found, dtype))[0]

        rows = jax.vmap(row)(jnp.eye(width_of(outputs), dtype=dtype))
        return first_of(outputs), rows


class EmpiricalFisher(GaussNewton):
    """The mean `dE_n/dθ (dE_n/dθ)'` of every example's gradient; see `Operator` for its verbs."""

    of = "empirical Fisher matrix"

    @verb
    def diagonal(
        self, params: PyTree, batch: Batch, *, chunk_size: int | None = 32
    ) -> dict[str, Float[Array, "*shape"]]:
        """The mean of every example's squared gradient, `[d_in + 1, d_out]` per layer.

        Where a kernel is used once per example its gradient is an outer product `a_n g_n'`,
        and the mean of its square `mean_n a_n^2 (g_n^2)'` one product of matrices;
        elsewhere the gradients of `chunk_size` examples are held at once.
        """
        check_chunk_size(chunk_size)
        inputs, targets = read_batch(self.objective, batch)
        graph, leaves = build_graph(self.objective, params, inputs), named_leaves(params)
        once = {  # layers whose kernel every example meets at one position
            name: layer
            for name, layer in graph.layers.items()
            if len(layer.uses) == layer.first.form.positions == 1 and not layer.indexed
        }
        found: dict[str, Array] = {}
        if once:
            model = linearize(graph, self.objective, params, inputs, targets, with_probes=True)
            own, sign = rooted(model.targets)
            _, gradients = model.pull(model.loss.gradients(model.outputs, own))
        for name, layer in once.items():
            rows = jnp.square(gradients[name].reshape(model.examples, -1).astype(model.dtype))
            rows = rows * jnp.asarray(sign, model.dtype).reshape(-1, 1)
            mean = single_diagonal(layer.first, model.values[layer.first.input], rows)
            found[name] = layer.stacked([mean]).reshape(layer.matrix_shape)
        inside = {p for layer in once.values() for p in layer.parameters}
        others = {n: jnp.asarray(leaf) for n, leaf in leaves.items() if n not in inside}

        def squares_of(example: Batch) -> dict[str, Array]:
            target, sign = rooted(example[1])
            alone = batch_of((example[0], target))

            def loss(own: dict[str, Array]) -> Scalar:
                return self.objective.mean_loss(with_leaves(params, own), alone)

            wide = {n: g.astype(factor_dtype(g.dtype)) for n, g in jax.grad(loss)(others).items()}
            return {n: jnp.asarray(sign, g.dtype) * jnp.square(g) for n, g in wide.items()}

        squares = mean_of_examples(squares_of, (inputs, targets), chunk_size) if others else {}
        return {
            name: found[name] if name in found else block.to_matrix(squares)
            for name, block in blocks_of(graph).items()
        }

    def _gradient(self, outputs: PyTree, target: PyTree) -> tuple[Float[Array, " K"], Scalar]:
        """The gradient times the root of the weight's size, and the weight's sign."""
        target, sign = rooted(target)
        gradient = self._loss(target).gradients(*batch_of((outputs, target)))[0]
        return gradient, jnp.asarray(sign, gradient.dtype)

    def _matrix(self, outputs: PyTree, target: PyTree) -> Float[Array, "K K"]:
        gradient, sign = self._gradient(outputs, target)
        return sign * gradient[:, None] * gradient

    def _root(self, outputs: PyTree, target: PyTree) -> Float[Array, "K 1"]:
        return self._gradient(outputs, target)[0][:, None]

    def _times(
        self, outputs: PyTree, target: PyTree, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        gradient, sign = self._gradient(outputs, target)
        return sign * gradient * jnp.sum(gradient * vector.astype(gradient.dtype))

    def _prepare(self, params: PyTree, batch: Batch, **options: Any) -> Prepared:
        return prepare(self.objective, params, batch, None, **options)


def hessian(objective: AnyObjective) -> Hessian:
    """The Hessian `H = d²/dθ² mean_n E_n` of an objective, eq. (6), without its penalty.

    Returns:
      An operator with the verbs of `Operator`: `matvec`, `dense`, `blocks`,
      `block_matvecs`, `diagonal`, `pre_activation`, `output`.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> kfgn.hessian(objective).matvec(params, batch, params).shape
    (3, 2)
    """
    return _of(Hessian, objective)


def gauss_newton(objective: AnyObjective) -> GaussNewton:
    """The Gauss-Newton matrix `G = mean_n J_n' B_n J_n` of an objective, eq. (16).

    B_n is the loss's Hessian in the outputs, without its negative eigenvalues if the
    loss is not convex.

    Returns:
      An operator with the verbs of `Operator`, and `jacobian` and `rank`.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> kfgn.gauss_newton(objective).dense(params, batch).shape
    (6, 6)
    """
    return _of(GaussNewton, objective)


def empirical_fisher(objective: AnyObjective) -> EmpiricalFisher:
    """The empirical Fisher matrix `F = mean_n (dE_n/dθ) (dE_n/dθ)'` of an objective.

    Returns:
      An operator with the verbs of `Operator`, and `jacobian` and `rank`.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> int(kfgn.empirical_fisher(objective).rank(params, batch))
    1
    """
    return _of(EmpiricalFisher, objective)


def _of(kind: type[Kind], objective: AnyObjective) -> Kind:
    """The operator, or the sum of those of the terms, which has the same verbs."""
    if isinstance(objective, SumOfObjectives):
        return cast(Kind, OperatorSum(objective, kind))
    return kind(objective)


def _astype(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)
