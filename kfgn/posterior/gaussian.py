"""A Gaussian over parameters whose precision is a curvature in its eigenbasis, and a prior."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.checks import check_whole
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype, map_examples, matmul, total
from kfgn.base.trees import batch_of, first_of, named_leaves, with_leaves
from kfgn.base.types import Array, Named, Number, PyTree, Scalar
from kfgn.curvature.forward_pass import as_outputs


class Arranged(Protocol):
    """Parameters as a matrix, or a stack of them, whose transpose as a map is its inverse."""

    def to_matrix(self, leaves: Named) -> Float[Array, "*S a b"]: ...

    def from_matrix(self, matrix: Float[Array, "*S a b"]) -> Named: ...


class Basis(NamedTuple):
    """`values`, and orthogonal matrices `U`, `W` to their eigenbasis `U' V W`; None is I."""

    values: Float[Array, "*S a b"]  # of the mean loss's curvature
    left: Float[Array, "*S a a"] | None = None
    right: Float[Array, "*S b b"] | None = None

    def into(self, matrix: Float[Array, "*S a b"]) -> Float[Array, "*S a b"]:
        """`U' V W`."""
        turned = matrix if self.left is None else matmul(jnp.swapaxes(self.left, -1, -2), matrix)
        return turned if self.right is None else matmul(turned, self.right)

    def back(self, matrix: Float[Array, "*S a b"]) -> Float[Array, "*S a b"]:
        """`U V W'`, its inverse."""
        turned = matrix if self.left is None else matmul(self.left, matrix)
        return turned if self.right is None else matmul(turned, jnp.swapaxes(self.right, -1, -2))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "bases", "examples", "mean_loss", "prior_precision"],
    meta_fields=["blocks"],
)
@dataclasses.dataclass(frozen=True)
class Posterior:
    """`N(θ*, Σ)` with `Σ^-1 = N C + τ I`, C the mean loss's curvature; `laplace` makes it.

    A pytree, which crosses `jit`. Parameters outside of its blocks are known exactly: they
    stay at the mean, and the prior is not theirs.

    Args:
      mean: θ*, the parameters.
      bases: C by block, in its eigenbasis.
      examples: N, or the sum of weights.
      mean_loss: of the examples at θ*, without a penalty.
      prior_precision: τ, of the prior `N(0, I/τ)`; an array of one number, or a dictionary
        with one for each block.
      blocks: by name; static.

    >>> import jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> inputs = jnp.array([[1.0], [1.0], [1.0]])
    >>> w = jnp.array([[0.5]])
    >>> posterior = kfgn.posterior.laplace(objective, w, (inputs, inputs), prior_precision=1.0)
    >>> float(posterior.solve(w)[0, 0])  # 0.5 / (3 + 1)
    0.125
    >>> posterior.sample(jax.random.key(0), 10).shape
    (10, 1, 1)
    >>> outputs, covariance = posterior.predict(lambda w, x: x @ w, inputs[:1])
    >>> float(outputs[0, 0]), float(covariance[0, 0, 0])
    (0.5, 0.25)
    """

    mean: PyTree
    bases: dict[str, Basis]
    examples: Scalar
    mean_loss: Scalar
    prior_precision: Scalar | dict[str, Scalar]
    blocks: tuple[tuple[str, Arranged], ...]

    def with_prior_precision(self, prior_precision: Number | Mapping[str, Number]) -> "Posterior":
        """The same with another τ, for which nothing is decomposed again.

        Raises:
          OptionError: a dictionary lacks a block, or has another.
        """
        given: Any = prior_precision
        if isinstance(given, Mapping):
            if set(given) != set(self.bases):
                raise OptionError(
                    f"prior_precision must have an entry for each of {sorted(self.bases)}, "
                    f"found {sorted(given)}"
                )
            given = {name: jnp.asarray(given[name]) for name in self.bases}
        return dataclasses.replace(self, prior_precision=jax.tree.map(jnp.asarray, given))

    def precisions(self) -> dict[str, Float[Array, "*S a b"]]:
        """The eigenvalues of `Σ^-1`, `N c_i + τ`, by block."""
        return {
            name: self.examples.astype(b.values.dtype) * b.values + self._prior(name)
            for name, b in self.bases.items()
        }

    def turned(self, leaves: Named) -> dict[str, Array]:
        """Leaves by name, as of a gradient, by block in its eigenbasis, `U' V W`."""
        return {
            name: self.bases[name].into(
                block.to_matrix(leaves).astype(self.bases[name].values.dtype)
            )
            for name, block in self.blocks
        }

    def solve(self, v: PyTree) -> PyTree:
        """`Σ v` for a pytree v like the parameters; zeros for those outside of the blocks.

        So it is `(N Q ⊗ G + τ)^-1 v`, an inverse-curvature product outside of training.
        """
        precisions = self.precisions()
        return self._by_block(v, lambda name, b, x: b.back(b.into(x) / precisions[name]))

    def sample(self, key: Array, count: int | None = None) -> PyTree:
        """Draws of the parameters, with a leading axis of so many; one without if None."""
        if count is not None:
            check_whole("count", count, 1)
            return jax.vmap(self.sample)(jax.random.split(key, count))
        precisions = self.precisions()
        names = list(self.bases)

        def drawn(name: str, basis: Basis, matrix: Array) -> Array:
            own = jax.random.fold_in(key, names.index(name))
            noise = jax.random.normal(own, matrix.shape, matrix.dtype)
            return basis.back(noise / jnp.sqrt(precisions[name]))

        moved = self._by_block(self.mean, drawn)
        return jax.tree.map(lambda a, d: a + d.astype(a.dtype), self.mean, moved)

    def predict(
        self,
        model: Callable[[PyTree, PyTree], PyTree],
        inputs: PyTree,
        *,
        chunk_size: int | None = 1,
    ) -> tuple[PyTree, Float[Array, "n K K"]]:
        """Outputs of the model, and their covariance `J_n Σ J_n'` where it is linearized.

        Args:
          model: `(params, inputs) -> outputs`, as an objective's; a model in evaluation.
          inputs: `[n, ...]`.
          chunk_size: examples at once; the Jacobian `[K, P]` of each is held.

        Returns:
          The outputs at θ*, and for each example the covariance of its K outputs. That of
          the targets of a regression has the noise's variance in addition.
        """
        precisions = self.precisions()

        def one(example: PyTree) -> tuple[PyTree, Float[Array, "K K"]]:
            alone = batch_of(example)
            outputs, pull = jax.vjp(lambda p: model(p, alone), self.mean)
            width = sum(leaf.size for leaf in jax.tree.leaves(outputs))
            dtype = factor_dtype(*(leaf.dtype for leaf in jax.tree.leaves(outputs)))

            def rows(cotangent: Float[Array, " K"]) -> dict[str, Array]:
                (found,) = pull(as_outputs(cotangent[None], outputs))
                turned = self.turned(named_leaves(found))
                return {n: x.reshape(-1) / jnp.sqrt(precisions[n]).reshape(-1)
                        for n, x in turned.items()}  # fmt: skip

            jacobian = jax.vmap(rows)(jnp.eye(width, dtype=dtype))
            return first_of(outputs), total(matmul(x, x.T) for x in jacobian.values())

        return map_examples(one, inputs, chunk_size)

    def sampled_outputs(
        self,
        model: Callable[[PyTree, PyTree], PyTree],
        inputs: PyTree,
        key: Array,
        count: int,
    ) -> PyTree:
        """Outputs `[count, n, ...]` of the model at draws of the parameters, one at a time.

        The mean of `jax.nn.softmax` of them predicts a class.
        """
        check_whole("count", count, 1)
        keys = jax.random.split(key, count)
        return jax.lax.map(lambda own: model(self.sample(own), inputs), keys)

    def log_marginal_likelihood(
        self, prior_precision: Number | Mapping[str, Number] | None = None
    ) -> Scalar:
        """The evidence `log p(D | τ)` of MacKay (1992), by which a prior is chosen.

            -N E(θ*) - 1/2 θ*'τ θ* + 1/2 log det τ - 1/2 log det (N C + τ)

        Constants that the loss leaves out, such as `-1/2 log 2π` for each target of half
        the squared error, are left out. Differentiable in `prior_precision`; None is the
        posterior's own.
        """
        if prior_precision is not None:
            return self.with_prior_precision(prior_precision).log_marginal_likelihood()
        sizes, turned = self.precisions(), self.turned(named_leaves(self.mean))
        value = -self.examples * self.mean_loss
        for name, precision in sizes.items():
            prior = self._prior(name)
            fit = prior * jnp.sum(jnp.square(turned[name]))
            volume = jnp.sum(jnp.log(precision / prior))
            value = value - (fit + volume).astype(value.dtype) / 2
        return value

    def with_most_evidence(self, *, steps: int = 100) -> "Posterior":
        """The same with one τ that makes the evidence largest, parameters held.

        MacKay's fixed point `τ = γ / |θ*|²`, with the number of parameters that the data
        determine, `γ = sum_i N c_i / (N c_i + τ)`.
        """
        check_whole("steps", steps, 1)
        turned = self.turned(named_leaves(self.mean))
        size = total(jnp.sum(jnp.square(x)) for x in turned.values())
        curved = [self.examples.astype(b.values.dtype) * b.values for b in self.bases.values()]

        def turn(_: Any, tau: Scalar) -> Scalar:
            determined = total(jnp.sum(x / (x + tau.astype(x.dtype))) for x in curved)
            return (determined / size).astype(tau.dtype)

        start = jnp.ones((), size.dtype)
        return self.with_prior_precision(jax.lax.fori_loop(0, steps, turn, start))

    def _prior(self, name: str) -> Scalar:
        own = self.prior_precision
        own = own[name] if isinstance(own, dict) else own
        return own.astype(self.bases[name].values.dtype)

    def _by_block(self, v: PyTree, change: Callable[[str, Basis, Array], Array]) -> PyTree:
        leaves = named_leaves(v)
        found: Named = {}
        for name, block in self.blocks:
            basis = self.bases[name]
            matrix = block.to_matrix(leaves).astype(basis.values.dtype)
            found |= block.from_matrix(change(name, basis, matrix))
        zeros = with_leaves(v, {n: jnp.zeros_like(x) for n, x in leaves.items()})
        return with_leaves(zeros, {n: x.astype(leaves[n].dtype) for n, x in found.items()})
