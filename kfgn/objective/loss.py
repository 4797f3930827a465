"""Per-example losses with the curvature of their outputs.

A loss maps the outputs and the target of ONE example to a scalar, summed over
the outputs. Beside its value it knows its output Hessian (the paper's
pre-activation Hessian of the last layer), a square root of it, and, where the
loss is the negative log-likelihood of a distribution, how to sample targets.
Batched methods take a leading axis of `N` examples; the outputs of an example,
flattened, have `K` entries.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float

from kfgn.base.devices import AxisName, split_over_devices
from kfgn.base.errors import LossError
from kfgn.base.linalg import count_of, map_examples, mean_of_examples
from kfgn.base.types import Array, Scalar
from kfgn.objective.draws import drawn
from kfgn.objective.shapes import masks_over
from kfgn.objective.structure import (
    is_entrywise,
    root_of_part,
    semi_definite_part,
    semi_definite_root,
)

Outputs = Any  # an array, or a pytree of arrays
Columns = Callable[[Array], Float[Array, "N K"]]


def flatten_batch(outputs: Outputs) -> Float[Array, "N K"]:
    """The outputs of a batch as one matrix."""
    leaves = jax.tree.leaves(outputs)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


class Loss:
    """A per-example loss; the generic rules here are derived by differentiation.

    With outputs o of one example, flattened to K entries, and E the loss,

        B = d²E/do²,  or its positive semi-definite part,   C C' = B,   g = dE/do.

    A loss with closed forms is a subclass that overrides some of the methods.

    >>> import jax.numpy as jnp, kfgn
    >>> loss = kfgn.losses.from_function(lambda o, y: jnp.sum((o - y) ** 4), convex=True)
    >>> loss.hessian(jnp.array([1.0, 2.0]), jnp.zeros(2)).shape
    (2, 2)

    Args:
      function: `(outputs, target) -> scalar` for one example.
      name: what errors call it.
      convex: whether the output Hessian is positive semi-definite everywhere.
        Where it is not, the Gauss-Newton quantities use its projection
        (negative eigenvalues set to zero), so that they stay semi-definite.
      sample: `(key, outputs) -> target` of one example, drawn from the model's
        predictive distribution, or None where the loss has no such reading.
      heeded: `(outputs, target) -> mask` of one example, in the outputs' structure with
        leaves that broadcast to theirs: which of them the target does not say to ignore.
    """

    def __init__(
        self,
        function: Callable[[Outputs, Any], Array],
        name: str,
        convex: bool = False,
        sample: Callable[[Array, Outputs], Any] | None = None,
        heeded: Callable[[Outputs, Any], Any] | None = None,
    ) -> None:
        self.function = function
        self.name = name
        self.convex = convex
        self._sample = sample
        self._heeded = heeded

    def __repr__(self) -> str:
        return f"kfgn.losses.{self.name}"

    def __call__(self, outputs: Outputs, target: Any) -> Scalar:
        """The loss of one example."""
        return self.function(outputs, target)

    # One example.

    def second_derivatives(self, outputs: Outputs, target: Any) -> Float[Array, " K"] | None:
        """The output Hessian's diagonal where it is a diagonal matrix by structure, else None.

        That is so for sums over the outputs, which are recognized in the trace of
        the product of the Hessian and a vector.
        """
        flat, product = self._product(outputs, target)
        return product(jnp.ones_like(flat)) if is_entrywise(product, flat) else None

    def hessian(self, outputs: Outputs, target: Any) -> Float[Array, "K K"]:
        """The exact output Hessian of one example."""
        diagonal = self.second_derivatives(outputs, target)
        if diagonal is not None:
            return jnp.diag(diagonal)
        flat, unravel = ravel_pytree(outputs)
        return jax.hessian(lambda o: self(unravel(o), target))(flat)

    def gauss_newton_diagonal(self, outputs: Outputs, target: Any) -> Float[Array, " K"] | None:
        """The Gauss-Newton output Hessian's diagonal where it is diagonal by structure."""
        diagonal = self.second_derivatives(outputs, target)
        return None if diagonal is None else jnp.maximum(diagonal, 0)

    def gauss_newton_hessian(self, outputs: Outputs, target: Any) -> Float[Array, "K K"]:
        """The semi-definite output Hessian that Gauss-Newton uses."""
        diagonal = self.gauss_newton_diagonal(outputs, target)
        if diagonal is not None:
            return jnp.diag(diagonal)
        hessian = self.hessian(outputs, target)
        return hessian if self.convex else semi_definite_part(hessian)

    def hessian_sqrt(self, outputs: Outputs, target: Any) -> Float[Array, "K R"]:
        """`C` with `C C'` the Gauss-Newton output Hessian of one example."""
        diagonal = self.gauss_newton_diagonal(outputs, target)
        if diagonal is not None:
            return jnp.diag(jnp.sqrt(diagonal))
        hessian = self.hessian(outputs, target)
        return semi_definite_root(hessian) if self.convex else root_of_part(hessian)

    def decomposed(self, outputs: Outputs, target: Any) -> int:
        """K where a root of an example's `[K, K]` output Hessian decomposes it, else 0."""
        if type(self).hessian_sqrt is not Loss.hessian_sqrt:
            return 0  # in closed form
        known = jax.eval_shape(self.second_derivatives, outputs, target) is not None
        return 0 if known else sum(leaf.size for leaf in jax.tree.leaves(outputs))

    @property
    def can_sample(self) -> bool:
        """Whether targets can be drawn from the model's predictive distribution."""
        return self._sample is not None

    def gauss_newton_product(
        self, outputs: Outputs, target: Any, vector: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        """The Gauss-Newton output Hessian of one example times a vector."""
        diagonal = self.gauss_newton_diagonal(outputs, target)
        if diagonal is not None:
            return diagonal * vector
        if not self.convex:
            return self.gauss_newton_hessian(outputs, target) @ vector
        return self._product(outputs, target)[1](vector)

    def _product(self, outputs: Outputs, target: Any) -> tuple[Array, Callable[[Array], Array]]:
        """The flat outputs, and the product of the exact output Hessian and a vector."""
        flat, unravel = ravel_pytree(outputs)
        gradient = jax.grad(lambda o: self(unravel(o), target))
        return flat, lambda v: jax.jvp(gradient, (flat,), (v,))[1]

    def sample(self, key: Array, outputs: Outputs) -> Any:
        """A target of one example drawn from the model's predictive distribution.

        Raises:
          LossError: the loss has none.
        """
        if self._sample is None:
            raise LossError(
                f"the loss {self.name!r} has no predictive distribution to sample targets from; "
                "expected a likelihood such as kfgn.losses.softmax_cross_entropy: pass sample= "
                "to kfgn.losses.from_function."
            )
        return self._sample(key, outputs)

    # A batch.

    @property
    def ignores(self) -> bool:
        """Whether targets may say that outputs count for nothing."""
        return self._heeded is not None

    def heeded(self, outputs: Outputs, targets: Any) -> Bool[Array, "N K"] | None:
        """Which outputs the targets do not say to ignore; None where that is all of them."""
        of = self._heeded
        if of is None:
            return None
        return flatten_batch(jax.vmap(lambda o, y: masks_over(self, of(o, y), o))(outputs, targets))

    def mean_hessian(self, outputs: Outputs, targets: Any) -> Float[Array, "K K"]:
        """The mean Gauss-Newton output Hessian, never `[N, K, K]` at once."""
        diagonals = jax.vmap(self.gauss_newton_diagonal)(outputs, targets)
        if diagonals is not None:
            return jnp.diag(jnp.mean(diagonals, axis=0))
        size = sum(leaf[0].size for leaf in jax.tree.leaves(outputs))
        return mean_of_examples(
            lambda one: self.gauss_newton_hessian(*one),
            (outputs, targets),
            chunk_size=max(1, 2**20 // size**2),
        )

    def sqrt_columns(self, outputs: Outputs, targets: Any) -> tuple[int, Columns]:
        """The number of columns and `k -> [N, K]`, the k-th column for each example."""
        diagonals = jax.vmap(self.gauss_newton_diagonal)(outputs, targets)
        if diagonals is not None:
            lengths, size = jnp.sqrt(diagonals), diagonals.shape[1]
            return size, lambda k: lengths * jax.nn.one_hot(k, size, dtype=lengths.dtype)
        roots = jax.vmap(self.hessian_sqrt)(outputs, targets)
        return roots.shape[-1], lambda k: jnp.take(roots, k, axis=-1)

    def sampled_gradients(
        self, key: Array, outputs: Outputs, targets: Any, axis_name: AxisName | None = None
    ) -> Float[Array, "N K"]:
        """Output gradients at targets drawn from the model's distribution.

        The batch's own targets tell only what counts, such as which labels are ignored.
        Without a distribution, they are `C s` with random signs s, which have the same
        second moment, the Gauss-Newton output Hessian `C C'`.
        With the name of an axis of devices, the examples are a device's part of a batch.
        """
        keys = split_over_devices(key, count_of(outputs), axis_name)
        if self._sample is None:
            return self._signed_roots(keys, outputs, targets)
        return self.gradients(outputs, jax.vmap(self.sample)(keys, outputs))

    def _signed_roots(self, keys: Array, outputs: Outputs, targets: Any) -> Float[Array, "N K"]:
        def signs(key: Array, like: Array) -> Array:
            row = jax.ShapeDtypeStruct(like.shape[-1:], like.dtype)
            return drawn(jax.random.rademacher, key, row)

        def of_one(one: tuple[Array, Outputs, Any]) -> Array:
            root = self.hessian_sqrt(*one[1:])
            return root @ signs(one[0], root)

        diagonals = jax.vmap(self.gauss_newton_diagonal)(outputs, targets)
        if diagonals is not None:
            return jnp.sqrt(diagonals) * jax.vmap(signs)(keys, diagonals)
        size = sum(leaf[0].size for leaf in jax.tree.leaves(outputs))
        return map_examples(of_one, (keys, outputs, targets), max(1, 2**20 // size**2))

    def gradients(self, outputs: Outputs, targets: Any) -> Float[Array, "N K"]:
        """The gradient of each example's loss in its outputs."""
        return flatten_batch(jax.vmap(jax.grad(self.function))(outputs, targets))

    # Checks: shapes always, values only where they are concrete.

    def check_shapes(self, outputs: Outputs, targets: Any) -> None:
        """Raises LossError where one example's outputs and target do not fit."""
        try:
            value = jax.eval_shape(self.function, outputs, targets)
        except Exception as error:
            raise LossError(
                f"the loss {self.name!r} failed with {type(error).__name__}: {error}\nIt was "
                f"called as loss(outputs, target) on one example, with outputs {outputs} and "
                f"target {targets}."
            ) from error
        if not hasattr(value, "shape") or value.shape != ():
            raise LossError(
                f"the loss {self.name!r} must return a scalar for one example, but returned "
                f"{jax.tree.map(lambda v: v.shape, value)}; sum it over the outputs."
            )

    def check_targets(self, outputs: Outputs, targets: Any) -> None:
        """Raises LossError where concrete targets lie outside the loss's domain."""


def from_function(
    per_example_loss: Callable[[Outputs, Any], Array],
    *,
    convex: bool = False,
    sample: Callable[[Array, Outputs], Any] | None = None,
    heeded: Callable[[Outputs, Any], Any] | None = None,
) -> Loss:
    """A loss from any twice differentiable function of one example.

    Args:
      per_example_loss: `(outputs, target) -> scalar` for one example; outputs
        may be a pytree.
      convex: promise that the function is convex in the outputs. It saves an
        eigendecomposition per example; without it the Gauss-Newton quantities
        use the nearest positive semi-definite output Hessian. A sum over the
        outputs, whose Hessian is diagonal, needs none either way.
      sample: `(key, outputs) -> target` for one example, from which KFAC draws. Without it
        KFAC takes the root of the output Hessian times random signs.
      heeded: `(outputs, target) -> mask` for one example, where the loss ignores outputs that
        targets tell of, such as padding: what counts, in the outputs' structure with leaves that
        broadcast to theirs. The factor Q then leaves out positions that reach no such output.

    Raises:
      LossError: it is no function.

    >>> import jax.numpy as jnp, kfgn
    >>> huber = kfgn.losses.from_function(
    ...     lambda o, y: jnp.sum(jnp.sqrt(1 + (o - y) ** 2)), convex=True
    ... )
    >>> float(huber(jnp.zeros(2), jnp.zeros(2)))
    2.0
    """
    if not callable(per_example_loss):
        raise LossError(
            f"expected a function (outputs, target) -> scalar, found {type(per_example_loss)}"
        )
    name = getattr(per_example_loss, "__name__", type(per_example_loss).__name__)
    return Loss(per_example_loss, name, convex, sample, heeded)
