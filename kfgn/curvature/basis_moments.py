"""Second moments of a layer's gradients in the eigenbasis of its factors (George et al. 2018).

With eigenvectors u_i of Q and w_j of G, and an example's gradient `M_n = sum_t a_nt g_nt'`
over all places t where it uses the kernel, they are

    S_ij = E[(u_i' M_n w_j)^2],

summed over the columns that g is pulled back from. That is the diagonal of the block in that
basis, at several places too, where factors are an approximation by `sharing`; with the columns
of the output Hessian's root it is that of the Gauss-Newton block, exactly.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kfgn.base.diagonals import cut
from kfgn.base.linalg import precision, row_products, sum_over_examples, total
from kfgn.base.types import Array
from kfgn.curvature.factors import beside_bias, slots_of
from kfgn.curvature.weights import Weights
from kfgn.model.layers.layer import Layer
from kfgn.model.layers.parameter_use import Use

#: Eigenvectors of Q and of G, in the shapes of these; None for the identity.
Basis: TypeAlias = tuple[Array | None, Array | None]
#: Of a slot's blocks.
Vectors: TypeAlias = Float[Array, "s k b b"] | None
#: Data operands and gradients of every use, `[N, ...]`, and where data routes examples.
Read: TypeAlias = dict[str, tuple[Array, Array, Array | None]]


def basis_moments(
    layer: Layer,
    values: dict[str, Array],
    gradients: dict[str, Array],
    basis: Basis,
    dtype: Any,
    weights: dict[str, Weights],
) -> Float[Array, "S i o"]:
    """S, from data operands and gradients of every use; i and o are padded as blocks are."""
    both = zip(*(_by_slot(layer, vectors) for vectors in basis), strict=True)
    found = []
    for uses, (left, right) in zip(slots_of(layer), both, strict=True):
        slot = _Slot(layer, uses, left, right, dtype, weights)
        routes = {n: weights[n].route if n in weights else None for n in uses}
        read = {n: (values[n], gradients[n], routes[n]) for n in uses}
        count = len(next(iter(gradients.values())))
        found.append(sum_over_examples(slot.moments, read, slot.bytes_each) / count)
    return layer.stacked(found)


def _by_slot(layer: Layer, vectors: Array | None) -> list[Vectors]:
    """What belongs to each slot, in the order of its uses."""
    if vectors is None:
        return [None] * len(layer.slots)
    whole = vectors.reshape(layer.stack, -1, *vectors.shape[-2:])
    if layer.order is not None:
        whole = whole[np.argsort(layer.order)]
    return list(jnp.split(whole, len(layer.slots)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    layer: Layer
    uses: dict[str, Use]
    left: Vectors
    right: Vectors
    dtype: Any
    weights: dict[str, Weights]

    @property
    def places(self) -> int:
        return sum(use.form.positions for use in self.uses.values())

    @property
    def looks_up(self) -> bool:
        """Whether rows are looked up in fewer places than there are rows."""
        rows = self.layer.activation_size
        indexed = all(use.form.indexed for use in self.uses.values())
        return self.left is None and indexed and 1 <= self.places < rows

    @property
    def bytes_each(self) -> int:
        """What the work on one example holds."""
        layer = self.layer
        groups, rows, columns = layer.first.form.groups, layer.activation_size, layer.d_out
        if self.looks_up:
            numbers = self.places * (2 * columns + self.places)
        else:
            numbers = self.places * (rows + columns) + (not self.single) * 2 * rows * columns
        return groups * numbers * jnp.dtype(self.dtype).itemsize

    @property
    def single(self) -> bool:
        """Whether an example's gradient is one outer product."""
        return self.places == 1 and all(x is None for x in self.slopes.values())

    @functools.cached_property
    def slopes(self) -> dict[str, Float[Array, "s i o"] | None]:
        """What gradients of entries are multiplied by: also zero for those of no parameter."""
        found = {n: self.weights[n].slopes if n in self.weights else None for n in self.uses}
        for name, use in self.uses.items():
            there = use.labels() >= 0
            if not there.all():
                bias = np.ones((*there.shape[:1], use.width - there.shape[1], *there.shape[2:]))
                own = jnp.asarray(np.concatenate([there, bias], axis=1), self.dtype)
                known = found[name]
                found[name] = own if known is None else known * own
        return found

    def moments(self, read: Read) -> Float[Array, "s i o"]:
        """The sum over the examples."""
        if self.looks_up:
            return self._of_rows(read)
        if self.single:
            ((name, arrays),) = read.items()
            a, g = self._operands(name, *arrays)
            squares = (jnp.square(_turned(x, u)) for x, u in ((a, self.left), (g, self.right)))
            return row_products(*squares)
        whole = total(
            self._gradient(*self._operands(n, *arrays), self.slopes[n])
            for n, arrays in read.items()
        )
        return jnp.sum(jnp.square(whole), axis=0)

    def _operands(
        self, name: str, values: Array, gradients: Array, route: Array | None
    ) -> tuple[Float[Array, "N s t i"], Float[Array, "N s t o"]]:
        """Those whose products are the gradient; of a flipped use the other way around."""
        use = self.uses[name]
        a = use.activations(values, self.dtype)
        g = use.pre_activations(gradients).astype(self.dtype)
        if route is not None:  # and the data has one group, which all kernels see
            a, g = a * route[..., None], g * route[..., None]
        return (beside_bias(self.layer, use, g), a) if use in self.layer.flipped else (a, g)

    def _gradient(
        self,
        a: Float[Array, "N s t i"],
        g: Float[Array, "N s t o"],
        slopes: Float[Array, "s i o"] | None,
    ) -> Float[Array, "N s i o"]:
        """`u_i' (sum_t a_t g_t' * D) w_j`: without D bases turn rows, where those are fewer."""
        early = (a.shape[2] <= g.shape[3], a.shape[2] <= a.shape[3])
        if slopes is not None:
            early = False, False
        a = _turned(a, self.left) if early[0] else a
        g = _turned(g, self.right) if early[1] else g
        whole = jnp.einsum("nsti,nsto->nsio", a, g, precision=precision())
        if slopes is not None:
            whole = slopes * whole
        if not early[0]:
            whole = _turned(whole.swapaxes(2, 3), self.left).swapaxes(2, 3)
        return whole if early[1] else _turned(whole, self.right)

    def _of_rows(self, read: Read) -> Float[Array, "s i o"]:
        """Of look-ups: what examples add to the rows that they look up."""
        places, gradients = [], []
        for name, (values, cotangents, route) in read.items():
            use = self.uses[name]
            places.append(index := use.form.activations(values))
            g = use.pre_activations(cotangents).astype(self.dtype) * use.kernel.factor
            if (slopes := self.slopes[name]) is not None:
                g = g * slopes[jnp.arange(g.shape[1])[:, None], index]
            g = g if route is None else g * route[..., None]
            gradients.append(_turned(g, self.right))
        index, g = jnp.concatenate(places, axis=2), jnp.concatenate(gradients, axis=2)
        same = (index[..., :, None] == index[..., None, :]).astype(self.dtype)
        whole = jnp.einsum("nstu,nsuo->nsto", same, g, precision=precision())
        zeros = jnp.zeros((g.shape[1], self.layer.activation_size, g.shape[3]), self.dtype)
        return zeros.at[jnp.arange(g.shape[1])[:, None], index].add(g * whole)


def _turned(rows: Float[Array, "N s t d"], vectors: Vectors) -> Float[Array, "N s t i"]:
    """The rows in the basis, in blocks side by side."""
    if vectors is None:
        return rows
    parts = cut(rows, vectors.shape[1])
    turned = jnp.einsum("nstkb,skbc->nstkc", parts, vectors, precision=precision())
    return turned.reshape(*rows.shape[:3], -1)
