"""What a row of the table of architectures is, and the parts that rows are made of.

A row says which parameters form one block together, by the names that
`kfgn.paths` gives them. `tests.tables.architectures` has the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kfgn.base.trees import path_name

Array = jax.Array
PyTree = Any
Build = Callable[[PyTree], tuple[Callable[[PyTree, PyTree], PyTree], PyTree]]

# For flax's layers, whose parameters are float32 otherwise, and for its normalizations,
# which promote implicitly otherwise.
KINDS: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
NORM: dict[str, Any] = {**KINDS, "force_float32_reductions": False}


class Case(NamedTuple):
    """A model over a batch, with parameters and inputs."""

    model: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    inputs: PyTree


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of the table, and the blocks its parameters belong to.

    Args:
      build: `inputs -> (model, params)`, of the parameters the shapes only.
      inputs: `(generator, count) -> inputs`, with a leading axis in every leaf.
      expected: by block name, the paths of its parameters, kernel first.
      unassigned: the paths of parameters that have no block.
      output: "vector"; "scalar"; "pooled", a vector that positions were reduced
        to; "sequence" and "image", one output vector per position; "tree".
      loss: its row in `tests.tables.architectures.LOSSES`.
      flat: the paths of parameters that the outputs do not depend on, by symmetry.
      tags: "bf16" where the model computes in bfloat16, with float32 parameters;
        "single" where a part of it is in float32 whatever the inputs are; "loose"
        where the library it is from needs implicit dtype promotion.
    """

    build: Build
    inputs: Callable[[np.random.Generator, int], PyTree]
    expected: dict[str, tuple[str, ...]]
    unassigned: tuple[str, ...] = ()
    output: str = "vector"
    loss: str = "squared_error"
    flat: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()

    @property
    def dtype(self) -> Any:
        """That of parameters and real inputs; needs the fixture `x64`."""
        return jnp.float32 if "bf16" in self.tags else jnp.float64

    @property
    def promotion(self) -> str:
        """The value of `jax.numpy_dtype_promotion` that the model needs."""
        return "standard" if "loose" in self.tags else "strict"

    @property
    def tolerance(self) -> float:
        """The relative error that rounding may make."""
        if "bf16" in self.tags:
            return 3e-2
        return 1e-5 if "single" in self.tags else 1e-12

    def case(self, count: int = 3, seed: int = 0) -> Case:
        inputs = self.inputs(np.random.default_rng([seed, 1]), count)
        inputs = jax.tree.map(lambda a: a.astype(self.dtype) if _is_real(a) else a, inputs)
        inputs = jax.device_put(inputs)  # numpy's arrays till here: no program for each shape
        model, shapes = self.build(inputs)
        return Case(model, fill(shapes, seed, self.dtype), inputs)


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


# Blocks.


def block(prefix: str, *leaves: str) -> dict[str, tuple[str, ...]]:
    """A block whose name is its parameters' common path."""
    return {prefix: tuple(f"{prefix}/{leaf}" for leaf in leaves)}


def alone(*paths: str) -> dict[str, tuple[str, ...]]:
    """A block for every parameter, with the parameter's own path as its name."""
    return {path: (path,) for path in paths}


def dense_blocks(*prefixes: str, bias: bool = True) -> dict[str, tuple[str, ...]]:
    """Blocks of flax's layers, "kernel" and "bias"."""
    return {p: (f"{p}/kernel", f"{p}/bias")[: 1 + bias] for p in prefixes}


def affine_blocks(*prefixes: str) -> dict[str, tuple[str, ...]]:
    """Blocks of plain layers, "w" and "b"."""
    return {p: (f"{p}/w", f"{p}/b") for p in prefixes}


# Parameters.


def raveled(params: PyTree) -> tuple[np.ndarray, Callable[[Array], PyTree]]:
    """All parameters in one vector, and the way back; as `ravel_pytree`, but with no programs."""
    leaves, tree = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def back(vector: Array) -> PyTree:
        parts = zip(jnp.split(vector, ends), leaves, strict=True)
        return jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in parts])

    return np.concatenate([np.ravel(leaf) for leaf in leaves]), back


def fill(shapes: PyTree, seed: int, dtype: Any) -> PyTree:
    """Values for every real leaf, none of them near zero; scales are positive."""
    rng = np.random.default_rng([seed, 2])

    def value(path, leaf):
        if not hasattr(leaf, "shape") or not _is_real(leaf):
            return leaf
        if path_name(path).rpartition("/")[2] in ("scale", "var", "g"):
            return jax.device_put(np.asarray(rng.uniform(0.6, 1.4, leaf.shape), dtype))
        signs = rng.choice([-1.0, 1.0], leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        values = signs * rng.uniform(0.6, 1.8, leaf.shape) / fan_in**0.5
        return jax.device_put(np.asarray(values, dtype))

    return jax.tree_util.tree_map_with_path(value, shapes)


def _as_shapes(tree: Any) -> PyTree:
    """Tuples of integers become shapes; dictionaries, lists and other tuples are trees."""

    def is_shape(node):
        return type(node) is tuple and all(isinstance(n, int) for n in node)

    def convert(node):
        return jax.ShapeDtypeStruct(node, jnp.float64) if is_shape(node) else node

    return jax.tree.map(convert, tree, is_leaf=is_shape)


# Models, by where they come from.


def plain(model: Callable, shapes: Any) -> Build:
    """A function of parameters whose shapes are given, a scalar's as `()`."""
    return lambda inputs: (model, _as_shapes(shapes))


def linen(module: nn.Module, *arguments: Any) -> Build:
    """A flax module; what it has besides parameters is closed over."""

    def build(inputs):
        variables = jax.eval_shape(module.init, jax.random.key(0), inputs, *arguments)
        params = {"params": variables["params"]}
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        rest = fill(rest, 1, jnp.float64)
        return lambda p, x: module.apply({**p, **rest}, x, *arguments), params

    return build


def net(*layers: Callable) -> Build:
    """flax modules and functions one after the other: "params/layers_0" and so on."""
    return linen(nn.Sequential(layers))


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Build:
    """An nnx module; what it has besides parameters is closed over."""

    def build(inputs):
        graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
        rest = fill(rest, 1, jnp.float64)
        return lambda p, x: nnx.merge(graph, p, rest)(x), params

    return build


def from_equinox(make: Callable[[Array], eqx.Module]) -> Build:
    """An equinox module of one example."""

    def build(inputs):
        shapes = eqx.filter_eval_shape(make, jax.random.key(0))
        params, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params

    return build


# Inputs.


def normal(*shape: int) -> Callable:
    """One array of normal inputs, of the given shape for an example."""
    return lambda rng, count: rng.normal(size=(count, *shape))


def tokens(vocabulary: int, *shape: int) -> Callable:
    """Integers below the size of a vocabulary, each as often as the others."""

    def make(rng, count):
        size = count * int(np.prod(shape))
        drawn = rng.permutation(np.arange(size) % vocabulary)
        return drawn.reshape(count, *shape).astype(np.int32)

    return make


def keys() -> Callable:
    """A random key for each example."""
    return lambda rng, count: jax.random.split(jax.random.key(int(rng.integers(100))), count)


def several(*makers: Callable, **named: Callable) -> Callable:
    """A tuple, or a dictionary, of inputs."""
    if named:
        return lambda rng, count: {name: make(rng, count) for name, make in named.items()}
    return lambda rng, count: tuple(make(rng, count) for make in makers)


# Layers.


def affine(layer: dict[str, Array], x: Array) -> Array:
    """`x W + b`."""
    return x @ layer["w"] + layer["b"]


def mean_positions(x: Array) -> Array:
    """The mean over all axes between the first and the last."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def Dense(features: int, **options: Any) -> nn.Dense:
    return nn.Dense(features, **KINDS, **options)
