"""Laplace's approximation of a posterior from the curvature at trained parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_choice
from kfgn.base.decompositions import eigh
from kfgn.base.errors import LayerError, OptionError
from kfgn.base.kronecker import eigen
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.base.types import Array, Batch, Named, Number, PyTree, Scalar, Shape
from kfgn.curvature.batch import value_grad_and_curvature
from kfgn.curvature.blocks import Block, LoneParameter, OwnBlock, blocks_of
from kfgn.curvature.factors import Factors
from kfgn.curvature.operators import gauss_newton
from kfgn.model.graph.unite import unite
from kfgn.objective.objective import Objective, examples_of
from kfgn.objective.sum_of import AnyObjective, require_objective
from kfgn.posterior.gaussian import Arranged, Basis, Posterior

STRUCTURES = ("kronecker", "diagonal", "blocks", "full")


def laplace(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch | Iterator[Batch],
    *,
    prior_precision: Number | Mapping[str, Number] | None = None,
    structure: str = "kronecker",
    method: str = "kflr",
    layers: Sequence[str] | None = None,
    examples: Number | None = None,
    key: Array | None = None,
) -> Posterior:
    """The Gaussian posterior around trained parameters, `Σ^-1 = N C + τ I`.

    C is the Gauss-Newton matrix of the mean loss, which is positive semi-definite also where
    the Hessian is not. "kronecker" is the approximation of Ritter, Botev and Barber (2018),
    with τ added to `N Q ⊗ G` exactly, in the factors' eigenbasis. The loss is read as
    `-log p(target | outputs)`: of `half_squared_error` the noise has the variance 1.

    Args:
      params: θ*, which minimize the objective.
      batch: the training data, as one batch, or an iterator of batches (`iter(batches)`),
        over which curvature and loss are averaged by their numbers of examples.
      prior_precision: τ of the prior `N(0, I/τ)`, or a dictionary by block; None takes the
        one that the objective's penalty is, `N l2`.
      structure: of C: "kronecker", "diagonal" (exact), "blocks" (exact, of every layer) or
        "full" (exact, all parameters together).
      method: for "kronecker", as in `kfgn.value_grad_and_curvature`.
      layers: names of the blocks that are uncertain, as of `kfgn.layers.find_blocks`, for
        instance the last layer's alone; None is all.
      examples: N, where the batch stands for more data; None is what is in the batches.
      key: for the method "kfac".

    Raises:
      OptionError: an unknown option, no prior, or a sum of objectives without `examples`.
      LayerError: `layers` names no block.

    >>> import jax.numpy as jnp, kfgn
    >>> model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
    >>> objective = kfgn.Objective(model, kfgn.losses.half_squared_error, l2=0.1)
    >>> params, batch = {"w": jnp.eye(3), "b": jnp.ones(3)}, (jnp.ones((4, 3)), jnp.ones((4, 3)))
    >>> posterior = kfgn.posterior.laplace(objective, params, batch)
    >>> posterior.precisions()["w"].shape
    (4, 3)
    """
    require_objective(objective)
    check_choice("structure", structure, STRUCTURES)
    if examples is None and not isinstance(objective, Objective):
        raise OptionError(
            "a sum of objectives has batches of several sizes: say how many examples its value "
            "is the mean of, with examples="
        )
    measure = jax.jit(functools.partial(_measure, objective, structure, method, layers))
    found: _Measured | None = None
    blocks: dict[str, Arranged] = {}
    batches = batch if isinstance(batch, Iterator) else iter([batch])
    for k, own in enumerate(batches):
        blocks = blocks or _blocks(objective, params, own, structure, layers)
        own_key = None if key is None else jax.random.fold_in(key, k)
        count = examples_of(objective, own, None) if isinstance(objective, Objective) else 1
        part = _Measured(jnp.asarray(count, float), *measure(params, own, own_key))
        found = part if found is None else _mean(found, part)
    if found is None:
        raise OptionError("the iterator gave no batch; it may have been used up before")
    count = found.examples if examples is None else jnp.asarray(examples, float)
    tau: Any = count * objective.l2 if prior_precision is None else prior_precision
    if prior_precision is None and isinstance(objective.l2, int | float) and objective.l2 == 0:
        raise OptionError("the objective has no penalty to be a prior: pass prior_precision=")
    bases = {name: _basis(found.curvature[name]) for name in blocks}
    posterior = Posterior(params, bases, count, found.loss, count, tuple(blocks.items()))
    return posterior.with_prior_precision(tau)


class _Measured(NamedTuple):
    """Of one batch or several: how many examples, their mean loss, their mean curvature."""

    examples: Scalar
    loss: Scalar
    curvature: dict[str, Any]


def _mean(a: _Measured, b: _Measured) -> _Measured:
    count = a.examples + b.examples
    share = b.examples / jnp.where(count == 0, 1, count)
    mean = jax.tree.map(lambda x, y: x + share.astype(x.dtype) * (y - x), a[1:], b[1:])
    return _Measured(count, *mean)


def _measure(
    objective: AnyObjective,
    structure: str,
    method: str,
    layers: Sequence[str] | None,
    params: PyTree,
    batch: Batch,
    key: Array | None,
) -> tuple[Scalar, dict[str, Any]]:
    loss = objective.mean_loss(params, batch)
    if structure == "kronecker":
        curvature_fn = value_grad_and_curvature(objective, method)
        return loss, dict(curvature_fn(params, batch, key=key)[1].factors)
    if structure == "diagonal":
        return loss, dict(gauss_newton(objective).diagonal(params, batch))
    if structure == "blocks":
        blocks = _layers(objective, params, batch, layers, LoneParameter)
        found = gauss_newton(objective).blocks(params, batch)
        return loss, {name: _Matrix(found[name]) for name in blocks}
    own = _parameters(objective, params, batch, layers)

    def of_own(model: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
        return lambda some, inputs: model(with_leaves(params, some), inputs)

    alone = objective.with_model(of_own)
    return loss, {"": _Matrix(gauss_newton(alone).dense(own, batch))}


class _Matrix(NamedTuple):
    matrix: Float[Array, "*S D D"]


def _basis(part: Any) -> Basis:
    """The eigenbasis of a block; eigenvalues below zero are roundoff."""
    if isinstance(part, Factors):
        left, u, right, w = eigen(*part)
        return Basis(left[..., :, None] * right[..., None, :], u, w)
    if isinstance(part, _Matrix):
        values, vectors = eigh(part.matrix)
        return Basis(jnp.maximum(values, 0)[..., None, :], None, vectors)
    return Basis(jnp.maximum(part, 0))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A block whose matrix is a row for each of its kernels, `[1, D]` or `[S, 1, D]`."""

    block: Block

    def to_matrix(self, leaves: Named) -> Array:
        matrix = self.block.to_matrix(leaves)
        slots = self.block.kernels
        return matrix.reshape(*(() if slots == 1 else (slots,)), 1, -1)

    def from_matrix(self, matrix: Array) -> Named:
        return self.block.from_matrix(matrix.reshape(self.block.matrix_shape))


@dataclasses.dataclass(frozen=True)
class _Together:
    """Parameters as one row, `[1, P]`, in flattening order."""

    shapes: tuple[tuple[str, Shape], ...]

    def to_matrix(self, leaves: Named) -> Array:
        dtype = jnp.result_type(*(leaves[name] for name, _ in self.shapes))
        rows = [leaves[name].reshape(1, -1).astype(dtype) for name, _ in self.shapes]
        return jnp.concatenate(rows, axis=1)

    def from_matrix(self, matrix: Array) -> Named:
        found, start = {}, 0
        for name, shape in self.shapes:
            stop = start + math.prod(shape)
            found[name], start = matrix[0, start:stop].reshape(shape), stop
        return found


def _blocks(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    structure: str,
    layers: Sequence[str] | None,
) -> dict[str, Arranged]:
    if structure == "full":
        own = _parameters(objective, params, batch, layers)
        return {"": _Together(tuple((name, leaf.shape) for name, leaf in own.items()))}
    alone = OwnBlock if structure == "kronecker" else LoneParameter
    blocks = _layers(objective, params, batch, layers, alone)
    if structure == "blocks":
        return {name: _Flat(block) for name, block in blocks.items()}
    return dict(blocks)


def _parameters(
    objective: AnyObjective, params: PyTree, batch: Batch, layers: Sequence[str] | None
) -> dict[str, Array]:
    """Those that are uncertain, in flattening order."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in named_leaves(params).items()}
    if layers is None:
        return leaves
    blocks = _layers(objective, params, batch, layers, LoneParameter)
    inside = {name for block in blocks.values() for name in block.parameters}
    return {name: leaf for name, leaf in leaves.items() if name in inside}


def _layers(
    objective: AnyObjective,
    params: PyTree,
    batch: Batch,
    layers: Sequence[str] | None,
    alone: type[LoneParameter] | type[OwnBlock],
) -> dict[str, Block]:
    """The blocks of these names; `alone` makes that of a parameter in no layer."""
    every = {
        name: alone(name, block.matrix_shape) if isinstance(block, LoneParameter) else block
        for name, block in blocks_of(unite(objective, params, batch)).items()
    }
    missing = [name for name in layers or () if name not in every]
    if missing:
        raise LayerError(
            f"layers names {', '.join(map(repr, missing))}, the model has the blocks "
            f"{', '.join(map(repr, every))}"
        )
    return {name: block for name, block in every.items() if layers is None or name in layers}
