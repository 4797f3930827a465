"""Layers: the parameters that share a block of the curvature, and all their uses.

A kernel that is used several times (tied weights, time steps of a recurrent
network) has several uses; one that stacks the kernels of many layers, each
used through its own slice, has several *slots*.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kfgn.base.errors import LayerError
from kfgn.base.types import Array
from kfgn.model.layers.parameter_use import Use
from kfgn.model.program.equations import Var


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One block of the curvature: a kernel, its bias if any, and where they act.

    Where factors are kept as blocks on their diagonals, `splits` of them, Q is
    `[S_i, 1, b_i, b_i]` and G `[1, S_o, b_o, b_o]`, and the parameters' matrix,
    padded with zeros, is cut into `[S_i, S_o, b_i, b_o]`.

    With slots and groups stacked in a leading axis `[S]`, which is left out
    where there is one of each, the block of slot s is `Q[s] ⊗ G[s]`.
    """

    name: str
    slots: tuple[tuple[Use, ...], ...]
    flipped: frozenset[Use] = frozenset()  # uses that see the kernel transposed
    splits: tuple[int, int] = (1, 1)  # blocks on the diagonals that stand for Q and G
    order: tuple[int, ...] | None = None  # of the stack as the slots' uses have it

    @property
    def uses(self) -> dict[str, Use]:
        """Every use by a name of its own, which is the layer's where there is one."""
        flat = [use for slot in self.slots for use in slot]
        if len(flat) == 1:
            return {self.name: flat[0]}
        return {f"{self.name}#{k}": use for k, use in enumerate(flat)}

    @property
    def first(self) -> Use:
        """A use that sees the kernel in the layer's own orientation."""
        return self.slots[0][0]

    @property
    def kind(self) -> str:
        """ "dense", "conv", "embedding", "scale", "shift", or a registered kind."""
        return self.first.form.kind

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the layer's parameters, kernel first."""
        return tuple(self.variables)

    @property
    def variables(self) -> dict[str, Var]:
        """Of the parameters, by name."""
        first = self.first
        return first.kernel.parameters | (first.bias.source.parameters if first.bias else {})

    @property
    def derived(self) -> bool:
        """Whether a use's matrix is more than entries of parameters, by a number, or chosen."""
        return any(use.derived for use in self.uses.values())

    @property
    def kernels(self) -> int:
        """The number of slots, with those that a loop runs over."""
        return len(self.slots) * self.first.form.slots

    @property
    def stack(self) -> int:
        """The number of slots times that of groups."""
        return len(self.slots) * self.first.form.groups

    @property
    def d_out(self) -> int:
        """The size of a pre-activation factor."""
        return self.first.form.d_out

    @property
    def activation_size(self) -> int:
        """The size of an activation factor: `d_in`, and one more with a bias."""
        return self.first.width

    @property
    def indexed(self) -> bool:
        """Whether activation factors are diagonals, kept as vectors."""
        return self.first.form.indexed and not self.flipped

    def positions(self, slot: int) -> int:
        """The number of places where a slot's kernel is used in one example."""
        return sum(use.form.positions for use in self.slots[slot])

    @property
    def activation_shape(self) -> tuple[int, ...]:
        """The shape of the activation factor."""
        size, (blocks, others) = self.activation_size, self.splits
        if self.indexed and others == 1:
            return self._stacked((size,))
        width = -(-size // blocks)
        return self._stacked((width, width) if self.splits == (1, 1) else (blocks, 1, width, width))

    @property
    def pre_activation_shape(self) -> tuple[int, ...]:
        """The shape of the pre-activation factor."""
        width = -(-self.d_out // self.splits[1])
        lead = () if self.splits == (1, 1) else (1, self.splits[1])
        return self._stacked((*lead, width, width))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the parameters as a matrix, `[S, d_in (+ 1), d_out]`."""
        if self.splits == (1, 1):
            return self._stacked((self.activation_size, self.d_out))
        return self._stacked((*self.splits, *self._block))

    @property
    def _block(self) -> tuple[int, int]:
        return -(-self.activation_size // self.splits[0]), -(-self.d_out // self.splits[1])

    def _stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.stack == 1 else (self.stack, *shape)

    def to_matrix(self, leaves: dict[str, Array]) -> Array:
        """The layer's parameters as one matrix `[d_in (+ 1), d_out]`, or a stack of them."""
        return self.in_blocks(self.stacked([slot[0].matrix(leaves) for slot in self.slots]))

    def in_blocks(self, whole: Array) -> Array:
        """A matrix `[S, d_in (+ 1), d_out]`, padded or not, in the shape of `matrix_shape`."""
        if self.splits == (1, 1):
            return whole.reshape(self.matrix_shape)
        (rows, columns), (height, width) = self.splits, self._block
        beyond = rows * height - whole.shape[-2], columns * width - whole.shape[-1]
        padded = jnp.pad(whole, ((0, 0), (0, beyond[0]), (0, beyond[1])))
        cut = padded.reshape(-1, rows, height, columns, width)
        return cut.swapaxes(2, 3).reshape(self.matrix_shape)

    def stacked(self, parts: list[Array]) -> Array:
        """What there is of every slot, `[s, ...]`, in one array in the order of the kernels."""
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return whole if self.order is None else whole[jnp.array(self.order)]

    def from_matrix(self, matrix: Array) -> dict[str, Array]:
        """The inverse of `to_matrix`, in each parameter's own shape and dtype.

        `to_matrix` moves entries, so its inverse is its transpose; entries that
        no use reads come back as zeros.
        """
        own = {name: v.aval for name, v in self.variables.items()}
        shapes = {n: jax.ShapeDtypeStruct(a.shape, matrix.dtype) for n, a in own.items()}
        (leaves,) = jax.linear_transpose(self.to_matrix, shapes)(matrix)
        return {name: leaves[name].astype(aval.dtype) for name, aval in own.items()}


def require_blocks(reasons: dict[str, str]) -> None:
    """Raises LayerError where parameters belong to no layer."""
    if reasons:
        lines = "\n".join(f"  {name!r} {reason}" for name, reason in reasons.items())
        raise LayerError(
            f"{len(reasons)} parameter(s) belong to no layer that kfgn has a block for:\n{lines}\n"
            "A layer's kernel may be moved, joined, masked, times or plus constants, or a function "
            "of every entry; entries that are made of several entries of parameters, as those of a "
            "normalized kernel, have no Kronecker factors.\n"
            'Pass unassigned="diagonal" to precondition them by the exact diagonal of the '
            'Gauss-Newton matrix, unassigned="gradient" to give them plain damped gradient steps, '
            "or keep them out of params and close over them."
        )
