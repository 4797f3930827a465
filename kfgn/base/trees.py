"""Names of parameters: the path of a leaf in its pytree, as in `params/Dense_0/kernel`."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

from kfgn.base.errors import ParameterError
from kfgn.base.types import Named, PyTree


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def path_name(path: tuple) -> str:
    """The path's keys joined by slashes.

    A trailing `.value` is dropped: it is how flax's nnx reaches the array of a
    variable in some trees (those an optimizer's init sees) but not in others.
    """
    names = [_key(entry) for entry in path]
    last_is_attribute = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
    if len(names) > 1 and names[-1] == "value" and last_is_attribute:
        names.pop()
    return "/".join(names)


def named_leaves(tree: PyTree) -> Named:
    """The leaves of a pytree by their names, in flattening order."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {path_name(path): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ParameterError("two parameters have the same path; rename one of them")
    return named


def check_direction(direction: Named, names: Collection[str]) -> None:
    """Raises ParameterError unless a direction's names are parameters'; absent ones are zeros."""
    if not isinstance(direction, Mapping) or not set(direction) <= set(names):
        raise ParameterError(
            f"a direction has {sorted(map(str, direction))}, expected parameters by name, some of "
            f"{sorted(names)}, as curvature.gradient has them."
        )


def batch_of(example: PyTree) -> PyTree:
    """A batch of one example: its leaves with a leading axis, `[1, ...]`."""
    return jax.tree.map(lambda a: a[None], example)


def first_of(batch: PyTree) -> PyTree:
    """The first example of a batch, the leaves without their leading axis."""
    return jax.tree.map(lambda a: a[0], batch)


def with_leaves(tree: PyTree, leaves: Named) -> PyTree:
    """The pytree with each named leaf replaced; leaves not named stay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(path_name(path), leaf), tree
    )
