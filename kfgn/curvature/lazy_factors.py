"""Factors as a pytree that computes them where they are asked for, and crosses jit until then.

It is a `Partial` of a static function and of the arrays which that reads.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.extend.core import Jaxpr
from jax.tree_util import Partial

from kfgn.base.devices import in_auto_axes
from kfgn.base.types import PyTree
from kfgn.curvature.convolutions import run_in_order


@dataclasses.dataclass(frozen=True)
class FactorsOf:
    """What computes the factors of these blocks; equal where its parts are, as `Partial` needs."""

    blocks: tuple[str, ...]
    compute: Callable[..., dict[str, Any]]

    def __call__(self, *read: PyTree) -> dict[str, Any]:
        return self.compute(*read)


def evaluate(lazy: Partial, stacked: int) -> dict[str, Any]:
    """The factors, in their order; of so many axes of curvatures, as `jax.vmap` stacks them.

    Those of shapes are shapes.
    """

    def run(lazy: Partial) -> dict[str, Any]:
        return lazy()

    for _ in range(stacked):
        run = jax.vmap(run)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(lazy))
    found = jax.eval_shape(run, lazy) if abstract else run(lazy)
    return {name: found[name] for name in blocks_of(lazy)}


def blocks_of(lazy: Partial) -> tuple[str, ...]:
    """The names of the factors."""
    factors_of: Any = lazy.func
    return factors_of.blocks


def unmerged(lazy: Partial) -> Partial:
    """The same, with the layers of a sum of objectives in two terms where they would be merged."""
    factors_of: Any = lazy.func
    apart = getattr(factors_of.compute, "apart", None)
    return lazy if apart is None else apart(*lazy.args)


def lazily(factors_of: Callable[..., dict[str, Any]], *given: PyTree) -> Partial:
    """The factors of a function that may read any arrays: traced now, and with it its errors.

    Nothing is computed, not even what depends on known arrays alone. What is `given`, shapes
    of arrays, the result takes as arguments.
    """
    program, shapes = jax.make_jaxpr(factors_of, return_shape=True)(*given)
    compute = _Program(program.jaxpr, jax.tree.structure(shapes))
    return Partial(FactorsOf(tuple(shapes), compute), *program.consts)


def known(factors: dict[str, Any]) -> Partial:
    """Factors that are there already."""
    return Partial(FactorsOf(tuple(factors), _same), factors)


def _same(factors: dict[str, Any]) -> dict[str, Any]:
    return factors


@dataclasses.dataclass(frozen=True)
class _Program:
    jaxpr: Jaxpr
    tree: Any

    def __call__(self, *read: Any) -> dict[str, Any]:
        run = functools.partial(_run, self.jaxpr)
        return jax.tree.unflatten(self.tree, in_auto_axes(run)(*jax.tree.leaves(read)))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(jaxpr: Jaxpr, *read: Any) -> list[Any]:
    constants = len(jaxpr.constvars)
    given = zip(read[constants:], jaxpr.invars, strict=True)
    arguments = [x.astype(cast(Any, v.aval).dtype) for x, v in given]
    return run_in_order(jaxpr, list(read[:constants]), arguments)
