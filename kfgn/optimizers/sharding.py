"""Blocks spread over devices: of those of one shape, each device has, inverts and applies a share.

Blocks whose factors and matrices have one shape are stacked, `[L, ...]`, with zeros behind up to
a multiple of the devices: L layers of one shape cost a device what `ceil(L / devices)` do. What is
sent are the directions, as many numbers as the gradient has; factors and inverses never are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kfgn.base.devices import AxisName, vary
from kfgn.base.errors import OptionError
from kfgn.base.linalg import factor_dtype
from kfgn.base.types import Array, Named, Scalar
from kfgn.curvature.blocks import LoneParameter
from kfgn.optimizers.layer_blocks import LayerBlocks
from kfgn.optimizers.preconditioner import Preconditioner
from kfgn.optimizers.state import Flag


class Shares(NamedTuple):
    """Stacks of blocks by their shape, sharded over their leading axis."""

    stacks: Named


def preconditioner_of(blocks: LayerBlocks, inverse: str, sharding: Any) -> Preconditioner:
    """The preconditioner, of shares where a sharding is given.

    Raises:
      OptionError: no NamedSharding of one axis, or an option that makes no sense.
    """
    if sharding is None:
        return Preconditioner(blocks, inverse)
    one = isinstance(sharding, NamedSharding) and len(sharding.spec) == 1
    if not one or sharding.spec[0] is None:
        raise OptionError(
            "factor_sharding must be jax.sharding.NamedSharding(mesh, PartitionSpec(axis)), of one "
            f"axis of the mesh, found {sharding!r}"
        )
    found = ShardedPreconditioner(blocks, inverse, sharding)
    if inverse not in ("factored", "eigen"):
        raise OptionError(f'factor_sharding is for inverse="factored" and "eigen", not "{inverse}"')
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class ShardedPreconditioner(Preconditioner):
    """The preconditioner whose factors and inverses are `Shares`."""

    sharding: Any = None  # a NamedSharding of one axis

    @property
    def axis(self) -> AxisName:
        """The axis of the mesh, or several as one."""
        return self.sharding.spec[0]

    @property
    def names(self) -> frozenset[Any]:
        """The axes of the mesh by their names."""
        return frozenset(self.axis if isinstance(self.axis, tuple) else (self.axis,))

    @property
    def devices(self) -> int:
        """How many have a share."""
        return math.prod(self.sharding.mesh.shape[name] for name in self.names)

    @property
    def inside(self) -> bool:
        """Whether the user's own `jax.shard_map` over the axis runs: shares are all there is."""
        return self.names <= set(jax.sharding.get_abstract_mesh().manual_axes)

    def groups(self, leaves: Named) -> dict[str, list[str]]:
        """The names of blocks alike in all shapes and their dtype, by those."""
        groups: dict[str, list[str]] = {}
        for name, block in self.blocks.present(leaves).items():
            shapes = [block.matrix_shape]
            if not isinstance(block, LoneParameter):
                shapes += [block.activation_shape, block.pre_activation_shape]
            dtype = factor_dtype(*(leaves[p].dtype for p in block.parameters))
            key = " ".join(["x".join(map(str, s)) or "1" for s in shapes] + [str(dtype)])
            groups.setdefault(key, []).append(name)
        return groups

    def init(self, leaves: Named) -> tuple[Any, Any]:
        """Shares of zeros, for factors and inverses."""
        own, groups = Preconditioner(self.blocks, self.inverse).init, self.groups(leaves)

        def shares(of: Named) -> Shares:
            stacks = {}
            for key, names in groups.items():
                zeros = functools.partial(self._zeros, len(names))
                stacks[key] = jax.tree.map(zeros, of[names[0]])
            return Shares(stacks)

        factors, inverses = jax.eval_shape(own, leaves)
        return shares(factors), shares(inverses)

    def _zeros(self, count: int, one: jax.ShapeDtypeStruct) -> Array:
        share = -(-count // self.devices)
        if self.inside:
            return vary(jnp.zeros((share, *one.shape), one.dtype), self.names)
        stack = jnp.zeros((share * self.devices, *one.shape), one.dtype)
        return jax.device_put(stack, self.sharding)

    def arranged(self, found: Named, leaves: Named) -> Any:
        """The shares of what every device has all of."""
        return self._by_share(lambda _, x: Shares(self._own(x)), (), self._stacked(found, leaves))

    def _stacked(self, found: Named, leaves: Named) -> Named:
        """What there is of the blocks, by groups."""
        return {
            key: jax.tree.map(lambda *x: jnp.stack(x), *(found[n] for n in names))
            for key, names in self.groups(leaves).items()
        }

    def _places(self, count: int) -> Array:
        """Where a device's share stands in a stack of so many; beyond it are zeros."""
        share = -(-count // self.devices)
        return jax.lax.axis_index(self.axis) * share + jnp.arange(share)

    def _own(self, stacks: Named) -> Named:
        """The device's share of stacks."""

        def share(stack: Array) -> Array:
            places = self._places(len(stack))
            own = jnp.take(stack, places, axis=0, mode="clip")
            there = (places < len(stack)).reshape(-1, *(1,) * (stack.ndim - 1))
            return jnp.where(there, own, jnp.zeros((), stack.dtype))

        return jax.tree.map(share, stacks)

    def _all(self, own: Array, count: int) -> Array:
        """A stack of so many from all shares; a sum where most devices would send zeros."""
        if len(own) * self.devices <= 2 * count:
            to = "invarying" if self.inside else "varying"
            return jax.lax.all_gather(own, self.axis, tiled=True, to=to)[:count]
        here = jnp.arange(count) == self._places(count)  # a share of one
        here = here.reshape(-1, *(1,) * (own.ndim - 1))
        return jax.lax.psum(jnp.where(here, own, jnp.zeros((), own.dtype)), self.axis)

    def items(self, factors: Any) -> dict[Any, Any]:
        """By stack and place in a device's share: devices take the same turns."""

        def one(x: Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

        devices = 1 if self.inside else self.devices
        return {
            (key, place): jax.tree.map(one, stack)
            for key, stack in factors.stacks.items()
            for place in range(len(jax.tree.leaves(stack)[0]) // devices)
        }

    def some(self, tree: Any, items: list[Any]) -> Any:
        """The shares of some places in stacks."""
        places = _by_stack(items)

        def taken(shares: Shares, _: Any) -> Shares:
            return Shares(
                {k: jax.tree.map(lambda x, p=p: x[p], shares.stacks[k]) for k, p in places.items()}
            )

        return self._by_share(taken, tree, ())

    def put(self, tree: Any, new: Any, items: list[Any]) -> Any:
        """Shares with those of some places replaced."""
        places = _by_stack(items)

        def replaced(both: tuple[Shares, Shares], _: Any) -> Shares:
            old, new = (shares.stacks for shares in both)
            found = {
                k: jax.tree.map(lambda x, y, p=p: x.at[p].set(y), old[k], new[k])
                for k, p in places.items()
            }
            return Shares(old | found)

        return self._by_share(replaced, (tree, new), ())

    def decompose(self, factors: Any, old: Any, due: Flag) -> Any:
        """What does not depend on the damping, recomputed where it is due."""
        own = super().decompose
        if self.inverse != "eigen":
            return factors

        def found(shares: tuple[Shares, Shares], due: Scalar) -> Shares:
            factors, old = shares
            return Shares(own(factors.stacks, old.stacks, due))

        return self._by_share(found, (factors, old), due)

    def invert(self, decomposed: Any, damping: Scalar) -> Any:
        """The inverses at a damping of each device's share."""
        own = super().invert
        return self._by_share(lambda x, k: Shares(own(x.stacks, k)), decomposed, damping)

    def extremes(self, decomposed: Any, damping: Scalar) -> tuple[Scalar, Scalar]:
        """Over all shares."""
        own = super().extremes

        def largest(shares: Shares, damping: Scalar) -> tuple[Scalar, Scalar]:
            return jax.lax.pmax(own(shares.stacks, damping), self.axis)

        return self._by_share(largest, decomposed, damping, everywhere=True)

    def solved(self, inverses: Any, damping: Scalar, gradient: Named) -> Named:
        """`C^-1 g` of every block: each device solves for its share, then all get all."""
        blocks = self.blocks.present(gradient).items()
        stacks = self._stacked({n: x.to_matrix(gradient) for n, x in blocks}, gradient)

        def solve(inverses: Shares, same: tuple[Scalar, Named]) -> Named:
            damping, stacks = same
            own = self._own(stacks)
            solved = {k: self._solve(x, damping, own[k]) for k, x in inverses.stacks.items()}
            return {k: self._all(x, len(stacks[k])) for k, x in solved.items()}

        found = self._by_share(solve, inverses, (damping, stacks), everywhere=True)
        groups = self.groups(gradient)
        return {name: found[key][i] for key, g in groups.items() for i, name in enumerate(g)}

    def _by_share(
        self, function: Callable[..., Any], shares: Any, same: Any, everywhere: bool = False
    ) -> Any:
        """A function of a device's share, and of what all devices have; so is its result."""
        if self.inside:
            return function(shares, same)
        return jax.shard_map(
            function,
            mesh=self.sharding.mesh,
            in_specs=(self.sharding.spec, PartitionSpec()),
            out_specs=PartitionSpec() if everywhere else self.sharding.spec,
            axis_names=self.names,
            check_vma=False,
        )(shares, same)


def _by_stack(items: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """The places of items, by their stacks."""
    return {key: np.array([p for k, p in items if k == key]) for key in dict(items)}
