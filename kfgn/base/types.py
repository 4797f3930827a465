"""The types that signatures name."""

from typing import Any, TypeAlias

import jax
from jaxtyping import Float

Array: TypeAlias = jax.Array
Scalar: TypeAlias = Float[Array, ""]
#: A number, or an array of one, whose value may be unknown while JAX traces.
Number: TypeAlias = float | jax.Array
#: Any nesting of containers that `jax.tree` knows, with arrays as leaves.
PyTree: TypeAlias = Any
#: What belongs to parameters or layers, by their names.
Named: TypeAlias = dict[str, Any]
#: `(inputs, targets)`: pytrees of arrays `[N, ...]`, one leading axis for all.
Batch: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
