"""The exact matrices of an objective as operators: Hessian, Gauss-Newton, empirical Fisher.

With J_n the Jacobian of example n's K outputs o in all P parameters, the three are

    A = (1/N) sum_n (J_n' B_n J_n  [+ sum_k (dE_n / do_k) (d²o_nk / dθ²)])  (+ l2 I),

and differ in the matrix B_n `[K, K]` in the outputs: the Hessian has the loss's own,
Gauss-Newton its positive semi-definite part, and the empirical Fisher matrix `g_n g_n'`
of the gradient `g_n = dE_n / do`. The Hessian alone has the second-order terms.

    kfgn.hessian(objective).matvec(params, batch, v)

All are of the mean per-example loss, without the penalty unless `with_l2` asks for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from kfgn.base.checks import check_chunk_size, check_flag, check_not_negative, check_size
from kfgn.base.errors import OptionError
from kfgn.base.linalg import (
    PRECISION,
    count_of,
    factor_dtype,
    map_examples,
    matmul,
    mean_of_examples,
    sum_over_examples,
)
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree
from kfgn.curvature.forward_pass import as_outputs, curved_product, linearize
from kfgn.curvature.parameter_blocks import refuse_large_blocks, split_block, split_matvec
from kfgn.curvature.per_example import Prepared, example_blocks, mean_diagonals, prepare
from kfgn.model.graph import build_graph
from kfgn.model.layer import Layer
from kfgn.objective.loss import flatten_batch
from kfgn.objective.objective import (
    Objective,
    check_batch,
    check_outputs,
    check_vector,
    require_batch,
    require_objective,
)

_REMEDY = "Use matvec, which forms no matrix, a smaller network or fewer examples."


@dataclasses.dataclass(frozen=True)
class Operator:
    """One of the exact matrices of an objective; every verb takes `(params, batch, ...)`.

    Layers, with the parameters in none, have the names of `kfgn.layers.find_blocks`; a
    layer's block acts on the row-major vec of `[d_in + 1, d_out]`, kernel, then bias.
    `chunk_size` is the number of examples that are worked on at once; None is all.

    Raises:
      OptionError: no objective; in the verbs, an option with a wrong value, or an
        array of more than 2 GiB.
      BatchError, ModelError, LossError, ParameterError: in the verbs, the input does not fit.
    """

    objective: Objective
    of: ClassVar[str]  # what errors call it

    def __post_init__(self) -> None:
        require_objective(self.objective)

    def matvec(
        self,
        params: PyTree,
        batch: Batch,
        v: PyTree,
        *,
        with_l2: bool = False,
        chunk_size: int | None = None,
    ) -> PyTree:
        """`A v` for a pytree v like params, by the R-operator, eq. (13); no matrix is formed.

        Args:
          params, batch, v: as everywhere; v has the shapes and dtypes of params.
          with_l2: whether the penalty's `l2 I` is added.
          chunk_size: a number takes the mean over chunks of so many examples, in memory
            that does not grow with the batch.
        """
        check_flag("with_l2", with_l2)
        check_chunk_size(chunk_size)
        check_vector(params, v)
        if chunk_size is None:
            result = self._linear(params, batch)(v)
        else:
            inputs, targets, _ = require_batch(self.objective, params, batch)

            def summed(chunk: Batch) -> PyTree:
                part, count = self._linear(params, chunk)(v), count_of(chunk)
                return jax.tree.map(lambda x: x.astype(factor_dtype(x.dtype)) * count, part)

            whole = sum_over_examples(summed, (inputs, targets), chunk_size=chunk_size)
            count = count_of(inputs)
            result = jax.tree.map(lambda x, a: (x / count).astype(a.dtype), whole, v)
        if not with_l2:
            return result
        weight = jnp.asarray(self.objective.l2)
        return jax.tree.map(lambda r, x: r + weight.astype(r.dtype) * x, result, v)

    def dense(self, params: PyTree, batch: Batch, *, with_l2: bool = False) -> Array:
        """A, `[P, P]`, with the leaves of params in flattening order, each raveled."""
        check_flag("with_l2", with_l2)
        _, _, outputs = require_batch(self.objective, params, batch)
        size, dtype = _size(params), _dtype(params, outputs)
        check_size(f"the dense {self.of}", (size, size), dtype, _REMEDY)
        matrix = self._dense(params, batch, dtype)
        if not with_l2:
            return matrix
        return matrix + jnp.asarray(self.objective.l2).astype(dtype) * jnp.eye(size, dtype=dtype)

    def blocks(
        self,
        params: PyTree,
        batch: Batch,
        *,
        per_example: bool = False,
        split_bias: bool = False,
    ) -> dict[str, Any]:
        """The block of every layer, `mean_n a_n a_n' ⊗ M_n`, eqs. (7)-(8), (16), (22).

        Args:
          params, batch: as everywhere.
          per_example: whether to give every example's, with a leading `[N]`, not the mean.
          split_bias: whether to give `ParameterBlocks`, by weights and biases.

        Returns:
          By layer, `[D, D]` with `D = (d_in + 1) d_out`; with a leading axis of slots
          for a parameter that stacks several kernels.
        """
        check_flag("per_example", per_example)
        check_flag("split_bias", split_bias)
        prepared = self._prepare(params, batch)
        graph, arguments = prepared.graph, prepared.arguments
        refuse_large_blocks(
            graph, params, prepared.dtype, count_of(arguments) if per_example else 1
        )
        of_all = map_examples if per_example else mean_of_examples
        found = of_all(example_blocks(prepared, params), arguments)
        if not split_bias:
            return found
        return {name: split_block(block, graph.layers.get(name)) for name, block in found.items()}

    def block_matvecs(
        self,
        params: PyTree,
        batch: Batch,
        *,
        per_example: bool = False,
        split_bias: bool = False,
    ) -> dict[str, Any]:
        """The products with the same blocks, which form no matrix.

        Args:
          params, batch: as everywhere.
          per_example: whether a function gives every example's product, with a leading `[N]`.
          split_bias: whether to give `ParameterMatvecs`, by weights and biases.

        Returns:
          By layer, a function of `[d_in + 1, d_out]`; by parameter in no layer, of its array.
        """
        check_flag("per_example", per_example)
        check_flag("split_bias", split_bias)
        inputs, _, _ = require_batch(self.objective, params, batch)
        graph, leaves = build_graph(self.objective, params, inputs), named_leaves(params)
        blocks = {**graph.layers, **dict.fromkeys(graph.reasons)}

        def matvec_of(name: str, layer: Layer | None) -> Callable[[Array], Array]:
            def each(matrix: Array) -> Array:
                def one(example: Batch) -> Array:
                    alone = jax.tree.map(lambda a: a[None], example)
                    return _in_block(self._linear(params, alone), params, name, layer, matrix)

                return map_examples(one, tuple(batch))

            def mean(matrix: Array) -> Array:
                return _in_block(self._linear(params, batch), params, name, layer, matrix)

            return each if per_example else mean

        found = {name: matvec_of(name, layer) for name, layer in blocks.items()}
        if not split_bias:
            return found
        return {name: split_matvec(name, f, blocks[name], leaves) for name, f in found.items()}

    def diagonal(
        self, params: PyTree, batch: Batch, *, chunk_size: int | None = 1
    ) -> dict[str, Array]:
        """The exact diagonal, `[d_in + 1, d_out]` per layer, `mean_n a_n^2 ⊗ diag(M_n)`.

        What lies above the first layers is formed as a diagonal only, so the
        recursion's largest product falls away.
        """
        check_chunk_size(chunk_size)
        return mean_diagonals(self._prepare(params, batch, diagonal=True), params, chunk_size)

    def diagonal_by_parameter(self, params: PyTree, batch: Batch) -> PyTree:
        """The same as a pytree like params, in at least float32."""
        graph = build_graph(self.objective, params, check_batch(batch)[0])
        found: dict[str, Array] = {}
        for name, values in self.diagonal(params, batch).items():
            layer = graph.layers.get(name)
            found.update({name: values} if layer is None else layer.from_matrix(values))
        return with_leaves(params, {n: x.astype(factor_dtype(x.dtype)) for n, x in found.items()})

    def pre_activation(
        self,
        params: PyTree,
        batch: Batch,
        *,
        reduce: str | None = None,
        chunk_size: int | None = 1,
    ) -> dict[str, Array]:
        """Each example's matrix in every layer's pre-activation, eqs. (8), (22).

        Args:
          params, batch: as everywhere.
          reduce: None gives `[N, D, D]` per use of a kernel; "mean" the mean over the
            batch, `[D, D]`, in memory that does not grow with N.
          chunk_size: as everywhere.
        """
        if reduce not in (None, "mean"):
            raise OptionError(f'reduce must be None or "mean", found {reduce!r}')
        check_chunk_size(chunk_size)
        prepared = self._prepare(params, batch, exact=False)
        of_all = map_examples if reduce is None else mean_of_examples
        return of_all(lambda one: prepared.walk_one(one).uses, prepared.arguments, chunk_size)

    def output(self, params: PyTree, batch: Batch) -> Array:
        """B, `[N, K, K]`: the matrix in each example's outputs."""
        inputs, targets = check_batch(batch)
        outputs = self.objective.model(params, inputs)
        check_outputs(self.objective.loss, outputs, inputs, targets)
        width, dtype = _width(outputs), _dtype((), outputs)
        shape = (count_of(inputs), width, width)
        check_size(f"the {self.of} of the outputs", shape, dtype, _REMEDY)
        return jax.vmap(self._matrix)(outputs, targets).astype(dtype)

    # What the three differ in; of one example, except for the last two.

    def _matrix(self, outputs: PyTree, target: PyTree) -> Array:
        """B, `[K, K]`."""
        raise NotImplementedError

    def _prepare(self, params: PyTree, batch: Batch, **options: Any) -> Prepared:
        return prepare(self.objective, params, batch, self._matrix, **options)

    def _linear(self, params: PyTree, batch: Batch) -> Callable[[PyTree], PyTree]:
        """`v -> A v`."""
        raise NotImplementedError

    def _dense(self, params: PyTree, batch: Batch, dtype: Any) -> Array:
        raise NotImplementedError


class Hessian(Operator):
    """The Hessian of the mean loss; see `Operator` for its verbs."""

    of = "Hessian"

    def _matrix(self, outputs, target):
        return self.objective.loss.hessian(outputs, target)

    def _prepare(self, params, batch, **options):
        return prepare(self.objective, params, batch, self._matrix, second_order=True, **options)

    def _linear(self, params, batch):
        gradient = jax.grad(lambda p: self.objective.mean_loss(p, batch))
        return lambda v: jax.jvp(gradient, (params,), (v,))[1]

    def _dense(self, params, batch, dtype):
        flat, unravel = ravel_pytree(_astype(params, dtype))

        def mean_loss(x: Array) -> Array:
            own = jax.tree.map(lambda a, p: a.astype(jnp.result_type(p)), unravel(x), params)
            return self.objective.mean_loss(own, batch)

        _, push = jax.linearize(jax.grad(mean_loss), flat)
        return map_examples(push, jnp.eye(flat.size, dtype=dtype), _ROWS)


class GaussNewton(Operator):
    """The Gauss-Newton matrix of the mean loss; see `Operator` for its other verbs."""

    of = "Gauss-Newton matrix"

    def jacobian(self, params: PyTree, batch: Batch) -> Array:
        """J, `[N, K, P]`: each example's outputs in all parameters, an example at a time."""
        inputs, _, outputs = require_batch(self.objective, params, batch)
        dtype = _dtype(params, outputs)
        shape = (count_of(inputs), _width(outputs), _size(params))
        check_size("the Jacobian of the outputs", shape, dtype, _REMEDY)
        return map_examples(lambda x: self._jacobian(params, x, dtype)[1], inputs)

    def rank(self, params: PyTree, batch: Batch, *, tolerance: float | None = None) -> Array:
        """The rank of the batch's matrix, without l2, a scalar.

        With C_n C_n' = B_n, it is the rank of the rows `C_n' J_n` of all examples,
        `[N R, P]`, and so at most N times the rank of B (appendix E, eq. 63). The
        singular values of the rows are those of A before squaring, which keeps twice
        the digits. They count where they exceed `tolerance` times the largest; None
        stands for the rounding unit times the larger side.
        """
        if tolerance is not None:
            check_not_negative("tolerance", tolerance)
        inputs, targets, outputs = require_batch(self.objective, params, batch)
        dtype, size = _dtype(params, outputs), _size(params)
        check_size("the rows", (count_of(inputs), _width(outputs), size), dtype, _REMEDY)

        def one(example: Batch) -> Array:
            output, jacobian = self._jacobian(params, example[0], dtype)
            return matmul(self._root(output, example[1]).astype(dtype).T, jacobian)

        rows = map_examples(one, (inputs, targets)).reshape(-1, size)
        values = jnp.linalg.svd(rows, compute_uv=False)
        relative = max(rows.shape) * jnp.finfo(dtype).eps if tolerance is None else tolerance
        return jnp.sum(values > relative * jnp.max(values, initial=0))

    def _matrix(self, outputs, target):
        return self.objective.loss.gauss_newton_hessian(outputs, target)

    def _root(self, outputs: PyTree, target: PyTree) -> Array:
        """C, `[K, R]`, with `C C' = B`."""
        return self.objective.loss.hessian_sqrt(outputs, target)

    def _times(self, outputs: PyTree, target: PyTree, vector: Array) -> Array:
        """`B vector`, `[K]`."""
        return self.objective.loss.gauss_newton_product(outputs, target, vector)

    def _linear(self, params, batch):
        inputs, targets = check_batch(batch)
        outputs, push = jax.linearize(lambda p: self.objective.model(p, inputs), params)
        check_outputs(self.objective.loss, outputs, inputs, targets)

        def curve(pushed: Array) -> Array:
            return jax.vmap(self._times)(outputs, targets, pushed) / count_of(inputs)

        return lambda v: curved_product(lambda p: flatten_batch(push(p)), v, curve)

    def _dense(self, params, batch, dtype):
        def one(example: Batch) -> Array:
            output, jacobian = self._jacobian(params, example[0], dtype)
            matrix = self._matrix(output, example[1]).astype(dtype)
            return matmul(jacobian.T, matmul(matrix, jacobian))

        return mean_of_examples(one, tuple(batch))

    def _jacobian(self, params: PyTree, example: PyTree, dtype: Any) -> tuple[PyTree, Array]:
        """One example's outputs, and their Jacobian `[K, P]` by a backward pass for each."""
        alone = jax.tree.map(lambda a: a[None], example)
        outputs, pull = jax.vjp(lambda p: self.objective.model(p, alone), params)

        def row(cotangent: Array) -> Array:
            (found,) = pull(as_outputs(cotangent[None], outputs))
            return ravel_pytree(_astype(found, dtype))[0]

        rows = jax.vmap(row)(jnp.eye(_width(outputs), dtype=dtype))
        return jax.tree.map(lambda a: a[0], outputs), rows


class EmpiricalFisher(GaussNewton):
    """The mean `dE_n/dθ (dE_n/dθ)'` of every example's gradient; see `Operator` for its verbs."""

    of = "empirical Fisher matrix"

    def diagonal(
        self, params: PyTree, batch: Batch, *, chunk_size: int | None = 32
    ) -> dict[str, Array]:
        """The mean of every example's squared gradient, `[d_in + 1, d_out]` per layer.

        Where a kernel is used once per example its gradient is an outer product `a_n g_n'`,
        and the mean of its square `mean_n a_n^2 (g_n^2)'` one product of matrices;
        elsewhere the gradients of `chunk_size` examples are held at once.
        """
        check_chunk_size(chunk_size)
        inputs, targets = check_batch(batch)
        graph, leaves = build_graph(self.objective, params, inputs), named_leaves(params)
        once = {name: layer for name, layer in graph.layers.items() if _used_once(layer)}
        found: dict[str, Array] = {}
        if once:
            model = linearize(graph, self.objective, params, inputs, targets, with_probes=True)
            _, gradients = model.pull(model.loss.gradients(model.outputs, model.targets))
        for name, layer in once.items():
            a = layer.first.activations(model.values[layer.first.input], model.dtype)[:, :, 0]
            g = layer.first.pre_activations(gradients[name]).astype(model.dtype)[:, :, 0]
            mean = jnp.einsum("nsi,nso->sio", a**2, g**2, precision=PRECISION) / len(a)
            found[name] = mean.reshape(layer.matrix_shape)
        inside = {p for layer in once.values() for p in layer.parameters}
        others = {n: jnp.asarray(leaf) for n, leaf in leaves.items() if n not in inside}
        squares: dict[str, Array] = {}
        if others:
            squares = mean_of_examples(
                lambda one: self._squares(params, others, one), (inputs, targets), chunk_size
            )
        left = {n: x.to_matrix(squares) for n, x in graph.layers.items() if n not in once}
        found |= left | {name: squares[name] for name in graph.reasons}
        return {name: found[name] for name in (*graph.layers, *graph.reasons)}

    def _squares(self, params: PyTree, own: dict[str, Array], example: Batch) -> dict[str, Array]:
        """One example's squared gradients of some parameters."""
        alone = jax.tree.map(lambda a: a[None], example)
        gradient = jax.grad(lambda p: self.objective.mean_loss(with_leaves(params, p), alone))(own)
        return {n: jnp.square(g.astype(factor_dtype(g.dtype))) for n, g in gradient.items()}

    def _gradient(self, outputs, target):
        one = jax.tree.map(lambda a: a[None], (outputs, target))
        return self.objective.loss.gradients(*one)[0]

    def _matrix(self, outputs, target):
        gradient = self._gradient(outputs, target)
        return gradient[:, None] * gradient

    def _root(self, outputs, target):
        return self._gradient(outputs, target)[:, None]

    def _times(self, outputs, target, vector):
        gradient = self._gradient(outputs, target)
        return gradient * jnp.sum(gradient * vector.astype(gradient.dtype))

    def _prepare(self, params, batch, **options):
        return prepare(self.objective, params, batch, None, **options)


def hessian(objective: Objective) -> Hessian:
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
    return Hessian(objective)


def gauss_newton(objective: Objective) -> GaussNewton:
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
    return GaussNewton(objective)


def empirical_fisher(objective: Objective) -> EmpiricalFisher:
    """The empirical Fisher matrix `F = mean_n (dE_n/dθ) (dE_n/dθ)'` of an objective.

    Returns:
      An operator with the verbs of `Operator`, and `jacobian` and `rank`.

    >>> import jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda p, x: jnp.tanh(x @ p), kfgn.losses.half_squared_error)
    >>> params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> int(kfgn.empirical_fisher(objective).rank(params, batch))
    1
    """
    return EmpiricalFisher(objective)


_ROWS = 16  # rows of a dense Hessian that are worked on at once


def _in_block(
    product: Callable[[PyTree], PyTree],
    params: PyTree,
    name: str,
    layer: Layer | None,
    matrix: Array,
) -> Array:
    """The whole product with a direction in one block, read in the same block."""

    def along(leaves: dict[str, Array]) -> dict[str, Array]:
        direction = with_leaves(jax.tree.map(jnp.zeros_like, params), leaves)
        return named_leaves(product(direction))

    if layer is None:
        return along({name: matrix})[name]
    slots = matrix.reshape(len(layer.slots), -1)
    parts = []
    for k in range(len(slots)):
        alone = jnp.zeros_like(slots).at[k].set(slots[k]).reshape(layer.matrix_shape)
        moved = layer.to_matrix(along(layer.from_matrix(alone)))
        parts.append(moved.reshape(slots.shape)[k])
    return jnp.stack(parts).reshape(layer.matrix_shape)


def _used_once(layer: Layer) -> bool:
    """Whether every example meets the layer's kernel at one position."""
    return len(layer.uses) == 1 and layer.first.form.positions == 1 and not layer.indexed


def _astype(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def _size(params: PyTree) -> int:
    """The number P of parameters."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


def _width(outputs: PyTree) -> int:
    """The number K of outputs of one example."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))


def _dtype(params: PyTree, outputs: PyTree) -> Any:
    own = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    return factor_dtype(*own, *(x.dtype for x in jax.tree.leaves(outputs)))
