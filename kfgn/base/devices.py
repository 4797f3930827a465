"""Batches that are spread over devices by `jax.shard_map` or `jax.pmap`.

Inside `jax.shard_map` JAX knows of each value over which axes of the mesh it
varies, and sums the derivative in what does not vary over those in which the
result does. So all that kfgn differentiates in varies as the batch does, and
what a device computes is of its own examples until `mean_over_devices`.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, TypeVar

import jax

from kfgn.base.errors import BatchError
from kfgn.base.types import Array, PyTree

#: The name of an axis of devices, or several.
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
Tree = TypeVar("Tree")


def varying_axes(tree: PyTree) -> frozenset[Any]:
    """The axes of the mesh over which a leaf varies; none outside of `jax.shard_map`."""
    return frozenset[Any]().union(*map(_varying, jax.tree.leaves(tree)))


def vary_like(tree: Tree, like: PyTree) -> Tree:
    """The same values, seen as varying over all axes over which a leaf of `like` varies."""
    return vary(tree, varying_axes(like))


def vary(tree: Tree, axes: frozenset[Any]) -> Tree:
    """The same values, seen as varying over these axes."""
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def vary_shapes(tree: Tree, axes: frozenset[Any]) -> Tree:
    """`vary` for shapes."""
    return jax.eval_shape(lambda shapes: vary(shapes, axes), tree) if axes else tree


def mean_over_devices(tree: Tree, axis_name: AxisName | None) -> Tree:
    """The mean over the devices of an axis; the tree itself without one."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name), tree)


def split_over_devices(key: Array, count: int, axis_name: AxisName | None) -> Array:
    """Keys for a device's examples: its part of those for the examples of all devices."""
    if axis_name is None:
        return jax.random.split(key, count)
    keys = jax.random.split(key, count * jax.lax.axis_size(axis_name))
    return jax.lax.dynamic_slice_in_dim(keys, jax.lax.axis_index(axis_name) * count, count)


def count_over_devices(count: int, axis_name: AxisName | None) -> int:
    """How many all devices have together where each has so many."""
    return count if axis_name is None else count * jax.lax.axis_size(axis_name)


def part_of_device(count: int | None, axis_name: AxisName | None) -> int | None:
    """How many of so many examples a device takes."""
    if count is None or axis_name is None:
        return count
    return -(-count // jax.lax.axis_size(axis_name))


def in_auto_axes(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """A function of arrays that runs under automatic axes, and gives replicated arrays.

    On a mesh with explicit axes JAX asks for the sharding of every value, which kfgn does not know.
    """

    def run(*args: PyTree) -> Tree:
        mesh, axes = _explicit_axes(args)
        if not axes:
            return function(*args)
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(
                function, axes=axes, out_sharding=jax.sharding.PartitionSpec()
            )(*args)

    return run


def replicated(tree: Tree) -> Tree:
    """The same values, on every device where they are sharded over explicit axes."""

    def everywhere(leaf: Any) -> Any:
        if not _explicit_axes(leaf)[1]:
            return leaf
        own = (jax.typeof(leaf) if isinstance(leaf, jax.core.Tracer) else leaf).sharding
        copies = jax.sharding.NamedSharding(own.mesh, jax.sharding.PartitionSpec())
        return jax.sharding.reshard(leaf, copies) if any(own.spec) else leaf

    return jax.tree.map(everywhere, tree)


def refuse_explicit_axes(*args: PyTree) -> None:
    """Raises BatchError where JAX asks for the sharding of every value, and kfgn knows it not."""
    _, axes = _explicit_axes(args)
    if axes:
        raise BatchError(
            f"the mesh has the explicit axis {', '.join(map(str, axes))}, under which this cannot "
            "run; make the mesh with axis_types=(jax.sharding.AxisType.Auto,), or wrap what is "
            "called, jax.jit(jax.sharding.auto_axes(step, "
            "out_sharding=jax.sharding.PartitionSpec()))."
        )


def refuse_named_vmap(tree: PyTree, axis_name: Hashable) -> None:
    """Raises BatchError where JAX has no collectives of a named `vmap`."""
    if varying_axes(tree):
        raise BatchError(
            f"Objective(axis_name={axis_name!r}) inside jax.shard_map needs check_vma=False: with "
            "check_vma=True JAX has no collectives over the axis of a jax.vmap."
        )


def _explicit_axes(tree: PyTree) -> tuple[Any, tuple[Any, ...]]:
    """The mesh with explicit axes on which a leaf lies, and these axes; none without."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
            pairs = zip(mesh.axis_names, mesh.axis_types, strict=True) if mesh else ()
            axes = [axis for axis, kind in pairs if kind is jax.sharding.AxisType.Explicit]
            if axes:
                return mesh, tuple(axes)
    return None, ()


def _varying(leaf: Any) -> frozenset[Any]:
    is_aval = hasattr(leaf, "manual_axis_type") or hasattr(leaf, "vma")
    is_shape = isinstance(leaf, jax.ShapeDtypeStruct) or is_aval
    aval = leaf if is_shape else jax.typeof(leaf)
    kind = getattr(aval, "manual_axis_type", aval)  # its name has changed between jax versions
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", None) or ())
