"""What was read of a model is kept, for as long as its objective lives."""

import weakref
from typing import Any

import jax
import numpy as np

from kfgn.base.devices import varying_axes
from kfgn.base.linalg import count_of
from kfgn.base.types import PyTree
from kfgn.model.layers.layer_kinds import LAYERS
from kfgn.model.program.primitives import REGISTERED
from kfgn.objective.objective import Objective

_kept: weakref.WeakKeyDictionary[Objective, dict[Any, Any]] = weakref.WeakKeyDictionary()

# Those of jax that traces depend on.
_SETTINGS = (
    "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_default_matmul_precision",
    "jax_default_prng_impl",
)  # fmt: skip


def remembered(
    objective: Objective, params: PyTree, inputs: PyTree, options: tuple
) -> tuple[dict[Any, Any], Any]:
    """What was read of an objective, and the key of all that this reading depends on besides."""
    leaves, tree = jax.tree.flatten((params, inputs))
    examples = len(jax.tree.leaves(params))  # one example of what follows
    shapes = tuple(
        (np.shape(x)[k >= examples :], getattr(x, "dtype", type(x))) for k, x in enumerate(leaves)
    )
    count = count_of(inputs) if objective.axis_name is not None else None
    # Equations hold on to the mesh that they were traced under.
    devices = jax.sharding.get_abstract_mesh(), varying_axes(leaves)
    settings = *devices, *(getattr(jax.config, name) for name in _SETTINGS)
    known = (*REGISTERED.items(), *LAYERS.items())
    return _kept.setdefault(objective, {}), (count, options, tree, shapes, settings, known)


def is_traced(*trees: PyTree) -> bool:
    """Whether there are tracers, or shapes only, in the place of values."""
    kinds = jax.core.Tracer, jax.ShapeDtypeStruct
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(trees))
