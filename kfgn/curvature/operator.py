"""What the exact matrices of an objective have in common: the verbs of an operator."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base import linalg
from kfgn.base.checks import check_choice, check_chunk_size, check_flag, check_size
from kfgn.base.devices import in_auto_axes, vary_like
from kfgn.base.trees import batch_of, named_leaves, with_leaves
from kfgn.base.types import Array, Batch, PyTree
from kfgn.curvature.blocks import Block, blocks_of, split_block, split_matvec
from kfgn.curvature.forward_pass import hold_statistics
from kfgn.curvature.per_example import Prepared, example_blocks, mean_diagonals, prepare
from kfgn.model.graph.build_graph import build_graph
from kfgn.objective.loss import Loss
from kfgn.objective.objective import (
    Objective,
    check_outputs,
    check_vector,
    read_batch,
    require_batch,
)
from kfgn.objective.sum_of import require_objective
from kfgn.objective.weights import loss_of

REMEDY = "Use matvec, which forms no matrix, a smaller network or fewer examples."
REMEDY_OF_BLOCKS = (
    "Use block_matvecs, which form no matrix, or look at "
    'kfgn.diagnostics.negative_curvature of="pre_activation".'
)


Verb = TypeVar("Verb", bound=Callable)


def verb(method: Verb) -> Verb:
    """A verb, of an operator whose objective has its statistics of the batch as data."""

    gives_arrays = method.__name__ != "block_matvecs"

    @functools.wraps(method)
    def of_examples(
        self: "Operator", params: PyTree, batch: Batch, *args: Any, **options: Any
    ) -> Any:
        def run(params: PyTree, batch: Batch, *args: Any) -> Any:
            params, args = vary_like((params, args), (params, batch))
            held, own = hold_statistics(self.objective, params, batch)
            same = held is self.objective
            operator = self if same else dataclasses.replace(self, objective=held)
            return method(operator, params, own, *args, **options)

        return (in_auto_axes(run) if gives_arrays else run)(params, batch, *args)

    return cast(Verb, of_examples)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One of the exact matrices of an objective; every verb takes `(params, batch, ...)`.

    Layers, with the parameters in none, have the names of `kfgn.layers.find_blocks`; a
    layer's block acts on the row-major vec of `[d_in + 1, d_out]`, kernel, then bias.
    `chunk_size` is the number of examples that are worked on at once; None is all.
    Statistics of the batch count as constants, as in all curvature of kfgn: products with
    the Hessian through them are those of `jax.grad` of the objective.
    Weights of examples are taken with their sign; each example's matrix has its own, so
    that the batch's is the mean of them.

    Raises:
      OptionError: no objective; in the verbs, an option with a wrong value, or an
        array of more than 2 GiB.
      BatchError, ModelError, LossError, ParameterError: in the verbs, the input does not fit.

    >>> import jax.numpy as jnp, kfgn
    >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    >>> operator = kfgn.hessian(kfgn.Objective(model, kfgn.losses.half_squared_error))
    >>> params, batch = {"w": jnp.eye(3), "b": jnp.ones(3)}, (jnp.ones((4, 3)), jnp.ones((4, 3)))
    >>> operator.dense(params, batch).shape, operator.output(params, batch).shape
    ((12, 12), (4, 3, 3))
    >>> operator.blocks(params, batch)["w"].shape, operator.diagonal(params, batch)["w"].shape
    ((12, 12), (4, 3))
    >>> operator.pre_activation(params, batch, reduce="mean")["w"].shape
    (3, 3)
    """

    objective: Objective
    of: ClassVar[str]  # what errors call it

    def __post_init__(self) -> None:
        require_objective(self.objective)

    @verb
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
          v: of the shapes and dtypes of params.
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
                part, count = self._linear(params, chunk)(v), linalg.count_of(chunk)
                return jax.tree.map(lambda x: x.astype(linalg.factor_dtype(x.dtype)) * count, part)

            whole = linalg.sum_over_examples(summed, (inputs, targets), chunk_size=chunk_size)
            count = linalg.count_of(inputs)
            result = jax.tree.map(lambda x, a: (x / count).astype(jnp.result_type(a)), whole, v)
        if not with_l2:
            return result
        weight = jnp.asarray(self.objective.l2)
        return jax.tree.map(lambda r, x: r + weight.astype(r.dtype) * x, result, v)

    @verb
    def dense(self, params: PyTree, batch: Batch, *, with_l2: bool = False) -> Float[Array, "P P"]:
        """A, with the leaves of params in flattening order, each raveled."""
        check_flag("with_l2", with_l2)
        _, _, outputs = require_batch(self.objective, params, batch)
        size, dtype = size_of(params), dtype_of(params, outputs)
        check_size(f"the dense {self.of}", (size, size), dtype, REMEDY)
        matrix = self._dense(params, batch, dtype)
        if not with_l2:
            return matrix
        return matrix + jnp.asarray(self.objective.l2).astype(dtype) * jnp.eye(size, dtype=dtype)

    @verb
    def blocks(
        self, params: PyTree, batch: Batch, *, per_example: bool = False, split_bias: bool = False
    ) -> dict[str, Any]:
        """The block of every layer, `mean_n a_n a_n' ⊗ M_n`, eqs. (7)-(8), (16), (22).

        Args:
          per_example: whether to give every example's, with a leading `[N]`, not the mean.
          split_bias: whether to give `ParameterBlocks`, by weights and biases.

        Returns:
          By layer, `[D, D]` with `D = (d_in + 1) d_out`; with a leading axis of slots
          for a parameter that stacks several kernels.
        """
        check_flag("per_example", per_example)
        check_flag("split_bias", split_bias)
        prepared = self._prepare(params, batch)
        blocks, arguments = blocks_of(prepared.graph), prepared.arguments
        copies = linalg.count_of(arguments) if per_example else 1
        for name, block in blocks.items():
            slots = block.kernels
            side = math.prod(block.matrix_shape) // slots
            shape = (copies * slots, side, side)
            check_size(f"the block of {name!r}", shape, prepared.dtype, REMEDY_OF_BLOCKS)
        of_all = linalg.map_examples if per_example else linalg.mean_of_examples
        found = of_all(example_blocks(prepared, params), arguments)
        return {n: split_block(x, blocks[n]) if split_bias else x for n, x in found.items()}

    @verb
    def block_matvecs(
        self, params: PyTree, batch: Batch, *, per_example: bool = False, split_bias: bool = False
    ) -> dict[str, Any]:
        """The products with the same blocks, which form no matrix.

        Returns:
          By layer, a function of `[d_in + 1, d_out]`, by parameter in no layer, of its array;
          with `split_bias`, of `(weights, biases)`, `[d_in, d_out]` and `[d_out]`, that gives
          such a pair; of the weights alone, and None, without a bias.
        """
        check_flag("per_example", per_example)
        check_flag("split_bias", split_bias)
        inputs, targets, _ = require_batch(self.objective, params, batch)
        blocks = blocks_of(build_graph(self.objective, params, inputs))
        linear = self._linear(params, batch)  # one forward pass for all products

        def matvec_of(block: Block) -> Callable[..., Any]:
            def mean(matrix: Array) -> Array:
                return in_block(linear, params, block, matrix)

            def each(matrix: Array) -> Array:
                def one(example: Batch) -> Array:
                    own = self._linear(params, batch_of(example))
                    return in_block(own, params, block, matrix)

                return linalg.map_examples(one, (inputs, targets))

            matvec = each if per_example else mean
            return split_matvec(matvec, block) if split_bias else matvec

        return {name: matvec_of(block) for name, block in blocks.items()}

    @verb
    def diagonal(
        self, params: PyTree, batch: Batch, *, chunk_size: int | None = 1
    ) -> dict[str, Float[Array, "*shape"]]:
        """The exact diagonal, `[d_in + 1, d_out]` per layer, `mean_n a_n^2 ⊗ diag(M_n)`.

        What lies above the first layers is formed as a diagonal only, so the
        recursion's largest product falls away.
        """
        check_chunk_size(chunk_size)
        return mean_diagonals(self._prepare(params, batch, diagonal=True), params, chunk_size)

    @verb
    def diagonal_by_parameter(self, params: PyTree, batch: Batch) -> PyTree:
        """The same as a pytree like params, in at least float32."""
        inputs, _ = read_batch(self.objective, batch)
        blocks = blocks_of(build_graph(self.objective, params, inputs))
        found: dict[str, Array] = {}
        for name, values in self.diagonal(params, batch).items():
            found |= blocks[name].from_matrix(values)
        return with_leaves(
            params, {n: x.astype(linalg.factor_dtype(x.dtype)) for n, x in found.items()}
        )

    @verb
    def pre_activation(
        self, params: PyTree, batch: Batch, *, reduce: str | None = None, chunk_size: int | None = 1
    ) -> dict[str, Float[Array, "*N D D"]]:
        """Each example's matrix in every layer's pre-activation, eqs. (8), (22).

        Args:
          reduce: None gives `[N, D, D]` per use of a kernel; "mean" the mean over the
            batch, `[D, D]`, in memory that does not grow with N.
        """
        check_choice("reduce", reduce, (None, "mean"))
        check_chunk_size(chunk_size)
        prepared = self._prepare(params, batch, exact=False)
        of_all = linalg.map_examples if reduce is None else linalg.mean_of_examples
        return of_all(lambda one: prepared.walk_one(one).uses, prepared.arguments, chunk_size)

    @verb
    def output(self, params: PyTree, batch: Batch) -> Float[Array, "N K K"]:
        """B: the matrix in each example's outputs."""
        inputs, targets = read_batch(self.objective, batch)
        outputs = self.objective.outputs(params, inputs)
        check_outputs(self._loss(targets), outputs, inputs, targets)
        width, dtype = width_of(outputs), dtype_of((), outputs)
        shape = (linalg.count_of(inputs), width, width)
        check_size(f"the {self.of} of the outputs", shape, dtype, REMEDY)
        return jax.vmap(self._matrix)(outputs, targets).astype(dtype)

    def _loss(self, targets: PyTree) -> Loss:
        return loss_of(self.objective.loss, targets, signed=True)

    # What the three differ in: B of one example, `v -> A v`, and the dense matrix.
    _matrix: ClassVar[Callable[..., Float[Array, "K K"]]]
    _linear: ClassVar[Callable[..., Callable[[PyTree], PyTree]]]
    _dense: ClassVar[Callable[..., Float[Array, "P P"]]]

    def _prepare(self, params: PyTree, batch: Batch, **options: Any) -> Prepared:
        return prepare(self.objective, params, batch, self._matrix, **options)


def in_block(
    product: Callable[[PyTree], PyTree], params: PyTree, block: Block, matrix: Array
) -> Array:
    """The whole product with a direction in one block, read in the same block."""

    def along(leaves: dict[str, Array]) -> dict[str, Array]:
        direction = with_leaves(jax.tree.map(jnp.zeros_like, params), leaves)
        return named_leaves(product(direction))

    slots = matrix.reshape(block.kernels, -1)
    parts = []
    for k in range(len(slots)):
        alone = jnp.zeros_like(slots).at[k].set(slots[k]).reshape(block.matrix_shape)
        moved = block.to_matrix(along(block.from_matrix(alone)))
        parts.append(moved.reshape(slots.shape)[k])
    return jnp.stack(parts).reshape(block.matrix_shape)


def size_of(params: PyTree) -> int:
    """The number P of parameters."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))


def width_of(outputs: PyTree) -> int:
    """The number K of outputs of one example."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))


def dtype_of(params: PyTree, outputs: PyTree) -> Any:
    own = [jnp.result_type(x) for x in jax.tree.leaves(params)]
    return linalg.factor_dtype(*own, *(x.dtype for x in jax.tree.leaves(outputs)))
