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
from kfgn.model.parameter_path import Source
from kfgn.model.parameter_use import Use


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One block of the curvature: a kernel, its bias if any, and where they act.

    With slots and groups stacked in a leading axis `[S]`, which is left out
    where there is one of each, the block of slot s is `Q[s] ⊗ G[s]`.
    """

    name: str
    slots: tuple[tuple[Use, ...], ...]
    flipped: frozenset[Use] = frozenset()  # uses that see the kernel transposed

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
        return tuple(source.name for source in self.sources)

    @property
    def sources(self) -> tuple[Source, ...]:
        first = self.first
        return (first.kernel,) + ((first.bias.source,) if first.bias else ())

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
        size = self.activation_size
        return self._stacked((size,) if self.indexed else (size, size))

    @property
    def pre_activation_shape(self) -> tuple[int, ...]:
        """The shape of the pre-activation factor."""
        return self._stacked((self.d_out, self.d_out))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the parameters as a matrix, `[S, d_in (+ 1), d_out]`."""
        return self._stacked((self.activation_size, self.d_out))

    def _stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.stack == 1 else (self.stack, *shape)

    def to_matrix(self, leaves: dict[str, Array]) -> Array:
        """The layer's parameters as one matrix `[d_in (+ 1), d_out]`, or a stack of them."""
        parts = [slot[0].matrix(leaves) for slot in self.slots]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return whole.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Array) -> dict[str, Array]:
        """The inverse of `to_matrix`, in each parameter's own shape and dtype.

        `to_matrix` moves entries, so its inverse is its transpose; entries that
        no use reads come back as zeros.
        """
        shapes = {s.name: jax.ShapeDtypeStruct(s.shape, matrix.dtype) for s in self.sources}
        (leaves,) = jax.linear_transpose(self.to_matrix, shapes)(matrix)
        return {s.name: leaves[s.name].astype(s.dtype) for s in self.sources}


def require_blocks(reasons: dict[str, str]) -> None:
    """Raises LayerError where parameters belong to no layer."""
    if reasons:
        lines = "\n".join(f"  {name!r} {reason}" for name, reason in reasons.items())
        raise LayerError(
            f"{len(reasons)} parameter(s) belong to no layer that kfgn has a block for:\n{lines}\n"
            'Pass unassigned="diagonal" to precondition them by the exact diagonal of the '
            'Gauss-Newton matrix, unassigned="gradient" to give them plain damped gradient steps, '
            "or keep them out of params and close over them."
        )
