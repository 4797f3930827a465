"""Uses: the equations where a parameter meets data, each read as one matrix product.

On one example every use computes, up to the order of its entries,

    h[s, t, o] = sum_i a[s, t, i] W[s, i, o] + b[s, o]

with groups s that do not mix (feature groups, heads with kernels of their own,
the units of a scale), positions t that share the kernel, inputs i and outputs o.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfgn.base.types import Array, Shape
from kfgn.model.layers.sources import Source
from kfgn.model.program.equations import Equation, Var, size


@dataclasses.dataclass(frozen=True)
class ChannelRule:
    """How a use acts where all positions t of its input share one channel matrix Ω.

    Args:
      layout: the data operand's entries, an array like it, to `[t, c]`, by
        methods that numpy's arrays have.
      congruence: `(kernel, Ω [c', c']) -> E[sum_t (J' (I ⊗ Ω) J)_tt] / T`, `[c, c]`,
        where c' are the outputs of all groups.
      left: `(kernel, block [c', d]) -> J' block` between equal positions, `[c, d]`.

    A kernel is given as the equation sees it. What is None is probed.

    Example:
      That of `h[t] = a[t] W` with `[t, i]` data:

      >>> from kfgn.layers import ChannelRule
      >>> rule = ChannelRule(
      ...     layout=lambda a: a,
      ...     congruence=lambda w, omega: w @ omega @ w.T,
      ...     left=lambda w, block: w @ block,
      ... )
      >>> rule.left(jnp.ones((3, 2)), jnp.eye(2)).shape
      (3, 2)
    """

    layout: Callable[[np.ndarray], np.ndarray]
    congruence: Callable[[Array, Array], Array] | None = None
    left: Callable[[Array, Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """How an equation reads as `h[s, t, o] = sum_i a[s, t, i] W[s, i, o]`.

    Args:
      kind: what users call it: "dense", "conv", "embedding", "scale", "shift".
      groups, positions, d_in, d_out: the lengths of s, t, i, o.
      activations: the data operand of a batch, `[N, ...]`, to `[N, s, t, i]`;
        to the indices i `[N, s, t]` that are looked up, if `indexed`.
      kernel: the kernel, as the equation sees it, to `[s, i, o]`; a reordering
        of its entries. None for a shift, whose parameter is its bias.
      outputs: the equation's result, with any leading axes, `[..., *shape]`, to
        `[..., s, t, o]`; by methods that numpy's arrays have, too.
      indexed: whether a is one-hot, so that its second moment is a diagonal.
      additive: whether the parameter is added, and may be the bias of another use.
      matrix: the kernel, as the equation sees it, to the transpose of the Jacobian
        between all entries of data and result, `[D_in, D_out]`.
      diagonal: the kernel to the Jacobian's diagonal `[D]`, if it is one.
      channels: how the kind acts on channels.

    The last three are closed forms of what is else found by differentiation.

    Example:
      That of `h[t] = a[t] W` with `[4, 3]` data and a `[3, 2]` kernel; see
      `kfgn.layers.register_layer` for the reader that makes it.

      >>> from kfgn.layers import Form
      >>> form = Form(
      ...     kind="my product", groups=1, positions=4, d_in=3, d_out=2,
      ...     activations=lambda a: a.reshape(-1, 1, 4, 3),
      ...     kernel=lambda w: w.reshape(1, 3, 2),
      ...     outputs=lambda h: h.reshape(*h.shape[:-2], 1, 4, 2),
      ... )
      >>> form.activations(jnp.ones((5, 4, 3))).shape
      (5, 1, 4, 3)
    """

    kind: str
    groups: int
    positions: int
    d_in: int
    d_out: int
    activations: Callable[[Any], Any]
    kernel: Callable[[Any], Any]
    outputs: Callable[[Any], Any]
    indexed: bool = False
    additive: bool = False
    matrix: Callable[[Array], Array] | None = None
    diagonal: Callable[[Array], Array] | None = None
    channels: ChannelRule | None = None
    slots: int = 1  # kernels among the groups that a loop takes from a stack
    turns: int = 1  # iterations of loops that it stands for

    @property
    def entrywise(self) -> bool:
        """Whether the outputs are laid out as the inputs."""
        return self.additive or self.diagonal is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """A bias that is added to a use: entry `order[s, o]` of its values goes to `h[s, :, o]`."""

    source: Source
    order: np.ndarray  # flat indices into the parameter

    def matrix(self, value: Any) -> Any:
        """`[s, 1, o]`, of the parameters' entries in one vector."""
        if np.array_equal(self.order.reshape(-1), np.arange(value.size)):
            return value.reshape(self.order.shape)[:, None, :]  # no gather, no scatter back
        return value[self.order][:, None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """By which data a use chooses its kernel, a group of its form, at each position."""

    index: Var
    places: np.ndarray  # `[t]`: where in the index each position's choice stands

    def one_hot(self, index: Array, groups: int, dtype: Any) -> Array:
        """`[N, s, t]` from `[N, ...]`: ones where position t is routed to group s."""
        chosen = index.reshape(index.shape[0], -1)[:, self.places]
        return jax.nn.one_hot(jnp.clip(chosen, 0, groups - 1), groups, axis=1, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One equation where a parameter meets data, with the bias that is added to its result."""

    form: Form
    kernel: Source
    bias: Bias | None
    input: Var | None  # the data operand; None where there is none to differentiate
    output: Var  # the pre-activation: the equation's result, or the sum with the bias
    equations: tuple[Equation, ...]
    order: np.ndarray | None = None  # where in `output` each entry of the product stands
    sign: float = 1.0  # with which the result enters the sum with the bias
    choice: Choice | None = None  # of the kernel, where data chooses it
    product_shape: Shape | None = None  # where it is not that of an equation's result

    @property
    def kernel_value(self) -> Var:
        """The kernel as the equation sees it."""
        return self.kernel.value

    @property
    def weighted(self) -> bool:
        """Whether entries of the parameters enter with slopes of their own."""
        return self.kernel.weighted or (self.bias is not None and self.bias.source.weighted)

    @property
    def derived(self) -> bool:
        """Whether it is more than a product with entries of parameters, scaled by a number."""
        sources = [self.kernel] + ([self.bias.source] if self.bias else [])
        return self.choice is not None or any(source.derived for source in sources)

    def signed(self, derivative: Array) -> Array:
        """A derivative of the product as one of `output`."""
        return derivative if self.sign == 1 else self.sign * derivative

    @property
    def width(self) -> int:
        """The number of inputs i, and one more with a bias."""
        return self.form.d_in + (self.bias is not None)

    def pre_activations(self, values: Any) -> Any:
        """Values like `output`, `[..., *shape]`, as `[..., s, t, o]`."""
        product = self.equations[0] if self.choice is None else self.equations[-1]
        raw = self.product_shape or product.outvars[0].aval.shape
        lead = values.ndim - self.output.aval.ndim
        flat = values.reshape(*values.shape[:lead], size(self.output))
        if self.order is not None:
            flat = flat[..., self.order]
        return self.form.outputs(flat.reshape(*flat.shape[:lead], *raw))

    def activations(self, values: Array, dtype: Any) -> Array:
        """Inputs of a batch, `[N, s, t, i]`, with the bias's 1 appended, scaled as the use does.

        Where the form is indexed, one-hot rows.
        """
        a = self.form.activations(values)
        if self.form.indexed:
            a = jax.nn.one_hot(a, self.form.d_in, dtype=dtype)
        a = self.kernel.factor * a.astype(dtype)
        if self.bias is None:
            return a
        one = jnp.full((*a.shape[:-1], 1), self.bias.source.factor, dtype)
        return jnp.concatenate([a, one], axis=-1)

    def matrix(self, leaves: dict[str, Any]) -> Any:
        """The parameters' entries as `[s, i (+ 1), o]`."""
        kernel = self.form.kernel(self.kernel.follow(leaves))
        if self.bias is None:
            return kernel
        bias = self.bias.matrix(self.bias.source.flat(leaves))
        return jnp.concatenate([kernel, bias.astype(kernel.dtype)], axis=-2)

    def slopes(self, of: dict[Var, Array]) -> Array:
        """`[s, i (+ 1), o]`: what the entries are multiplied by, from the sources' slopes.

        The factors of sources, which `activations` knows, are not among them.
        """
        kernel = jnp.ones(self.form.kernel(self.kernel.labels()).shape)
        if self.kernel.weighted:
            kernel = self.form.kernel(of[self.kernel.value])
        if self.bias is None:
            return kernel
        source, bias = self.bias.source, jnp.ones_like(kernel[:, :1])
        if source.weighted:
            flat = jnp.zeros(math.prod(source.shape), kernel.dtype)
            values = of[source.value].astype(kernel.dtype)
            bias = self.bias.matrix(flat.at[source.labels()].set(values))
        return jnp.concatenate([kernel, bias], axis=1)

    def labels(self) -> np.ndarray:
        """The flat index of the kernel's entry at every place of `[s, i, o]`."""
        return np.asarray(self.form.kernel(self.kernel.labels()))
