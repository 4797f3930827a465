"""Kernels that are functions of their parameters' entries: what factors are multiplied by."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from kfgn.base.devices import AxisName, mean_over_devices
from kfgn.base.linalg import weighed
from kfgn.base.types import Array
from kfgn.model.graph.graph import Graph


class Weights(NamedTuple):
    """What the rows and columns of a use's matrix are multiplied by, `r_i c_o`.

    The block of entries with slopes D is `D[i, o] D[j, p] Q[i, j] G[o, p]`, which is a
    Kronecker product where D is of rank one; else D² is replaced by its rows' means
    times its columns', over the mean of all. Zeros are left out: entries that a mask
    takes away have no curvature, and are no matter.
    """

    rows: Float[Array, "s i"]
    columns: Float[Array, "s o"]
    route: Float[Array, "N s t"] | None = None  # ones where data chooses the group s
    often: Float[Array, "s t"] | None = None  # their mean over the batch
    slopes: Float[Array, "s i o"] | None = None  # D, if it is not all ones

    def counted(
        self, importance: Float[Array, " N"] | None, axis_name: AxisName | None
    ) -> "Weights":
        """With how often positions are routed to a group, in a batch of weighted examples."""
        if self.route is None:
            return self
        often = jnp.mean(weighed(importance, self.route), axis=0)
        return self._replace(often=mean_over_devices(often, axis_name))

    def routed(self, rows: Float[Array, "N s t d"]) -> Float[Array, "N s t d"]:
        """Rows of all positions, at the groups that they are routed to."""
        return rows if self.route is None else rows * self.route[..., None]

    @property
    def positions(self) -> Float[Array, "s 1 1"] | float:
        """How many an example routes to a group, in the mean."""
        assert self.often is not None
        mean = jnp.sum(self.often, axis=1)
        return jnp.where(mean > 0, mean, 1)[:, None, None]


def weights_of(
    graph: Graph, params: dict[str, Array], values: dict[Any, Array], dtype: Any
) -> dict[str, Weights]:
    """The weights of every use that has slopes, or is chosen by data, by its name."""
    slopes, found = graph.slopes(params), {}
    for name, use in graph.uses.items():
        if use.weighted or use.choice is not None:
            own = use.slopes(slopes).astype(dtype)
            found[name] = _rank_one(own)._replace(slopes=own if use.weighted else None)
        if use.choice is not None:
            route = use.choice.one_hot(values[use.choice.index], use.form.groups, dtype)
            found[name] = found[name]._replace(route=route)
    return found


def _rank_one(d: Float[Array, "s i o"]) -> Weights:
    dtype = d.dtype
    squares, there = jnp.square(d), (d != 0).astype(dtype)

    def mean(*axes: int) -> Array:
        return jnp.sum(squares, axes) / jnp.maximum(jnp.sum(there, axes), 1)

    rows, columns, every = mean(2), mean(1), jnp.maximum(mean(1, 2), jnp.finfo(dtype).tiny)
    # Signs are those in the row that is largest, and against it.
    largest = jnp.argmax(rows, axis=1)[:, None, None]
    base = jnp.take_along_axis(d, largest, axis=1)[:, 0]
    sign = jnp.where(jnp.einsum("sio,so->si", d, base) < 0, -1, 1)
    turned = jnp.where(jnp.einsum("sio,si->so", d, sign * jnp.sqrt(rows)) < 0, -1, 1)
    root = jnp.sqrt(jnp.sqrt(every))[:, None]
    return Weights(sign * jnp.sqrt(rows) / root, turned * jnp.sqrt(columns) / root)


def on_both_sides(
    matrix: Float[Array, "s d d"], weights: Float[Array, "s d"]
) -> Float[Array, "s d d"]:
    """`matrix[i, j] w[i] w[j]`."""
    return matrix * weights[:, :, None] * weights[:, None, :]
