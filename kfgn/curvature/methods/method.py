"""What a curvature method is: how its pre-activation factors are made, and at what cost."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.devices import AxisName
from kfgn.base.errors import OptionError
from kfgn.base.linalg import sum_of_examples
from kfgn.base.types import Array, PyTree
from kfgn.curvature.basis_moments import Basis, basis_moments
from kfgn.curvature.factors import Moments, gradient_moments
from kfgn.curvature.forward_pass import Linearized


class Request(NamedTuple):
    """A forward pass, and the options of `value_grad_and_curvature` that methods read."""

    model: Linearized
    samples: int
    sharing: str
    spatial: str
    key: Array | None
    axis_name: AxisName | None  # of devices that have further examples
    importance: Float[Array, " N"] | None  # of the examples, where they differ

    def column_moments(self, column: Float[Array, "N K"]) -> dict[str, Moments]:
        """The second moments of a cotangent at every layer's pre-activations."""
        _, cotangents = self.model.pull(column)
        return {
            name: gradient_moments(
                layer,
                {n: cotangents[n] for n in layer.uses},
                self.sharing,
                self.model.dtype,
                self.model.weights,
            )
            for name, layer in self.model.graph.layers.items()
        }

    def column_basis_moments(
        self, bases: dict[str, Basis], column: Float[Array, "N K"]
    ) -> dict[str, Float[Array, "S i o"]]:
        """Those of a cotangent's gradients in a basis of every layer."""
        model = self.model
        _, cotangents = model.pull(column)
        return {
            name: basis_moments(
                layer,
                {n: model.values[use.input] for n, use in layer.uses.items()},
                {n: cotangents[n] for n in layer.uses},
                bases[name],
                model.dtype,
                model.weights,
            )
            for name, layer in model.graph.layers.items()
        }


class UseCost(NamedTuple):
    """FLOPs of one use of a kernel, as `kfgn.inspect` explains them."""

    activation: int  # its part of the activation factor
    column: int  # one cotangent's moment, and its way back to the use's input
    congruence: int  # of the mean matrix on its way back to the use's input
    columns: int  # of the output Hessian's root


class LossCost(NamedTuple):
    """FLOPs of what a batch's output Hessians take, zero where they are known in closed form."""

    mean: int  # the mean Hessian
    root: int  # a square root of each
    drawn: int  # gradients at sampled targets, or the root times random signs


class Method:
    """How pre-activation factors are made; one object for each, registered by its name."""

    name: ClassVar[str]
    draws: ClassVar[bool] = False  # whether it needs a key
    probes: ClassVar[bool] = True  # whether it needs gradients at pre-activations
    walks: ClassVar[bool] = False  # whether it goes through every value, loops unrolled
    spatial: ClassVar[tuple[str, ...]] = ("joint",)  # the values of `spatial` it knows

    def moments(self, request: Request) -> dict[str, Moments]:
        """G of every layer, eq. (25) or what stands for it."""
        return self.over_columns(request, request.column_moments)

    def over_columns(self, request: Request, of: Callable[[Array], PyTree]) -> PyTree:
        """The sum of what is quadratic in a cotangent `[N, K]` of the outputs, over such as
        have the curvature: unless a method has others, the columns of the Hessian's root."""
        loss, outputs = request.model.loss, request.model.outputs
        count, column = loss.sqrt_columns(outputs, request.model.targets)
        return sum_of_examples(lambda k: of(column(k)), jnp.arange(count))

    def flops(self, use: UseCost) -> int:
        """Of both factors, for one use of a kernel and one sample."""
        raise NotImplementedError

    def passes(self, columns: int) -> int:
        """Cotangents that `over_columns` goes through, with one sample."""
        return columns

    def flops_between(self, walk: int, loss: LossCost) -> int:
        """Beside the layers, where a walk of the mean matrix through all nodes takes so many."""
        return loss.root

    def check_key(self, key: Array | None) -> None:
        """Raises OptionError where a key is missing, or given and not used."""
        if self.draws and key is None:
            raise OptionError(
                f'method "{self.name}" samples targets and needs a random key: call it as '
                "curvature_fn(params, batch, key=jax.random.key(0)), a new key for each batch."
            )
        if not self.draws and key is not None:
            raise OptionError(f"method {self.name!r} draws nothing: call it without key=")
