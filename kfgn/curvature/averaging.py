"""The curvature of several micro-batches as one, for gradients that are accumulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from kfgn.base.errors import OptionError
from kfgn.base.types import Array
from kfgn.curvature.batch import Curvature


def average_curvature(curvatures: Sequence[Curvature]) -> Curvature:
    """The mean of the curvatures of micro-batches of one size, at the same params.

    Value, gradient, quadratic model and objective are those of the whole
    batch; so are the factors of "kflr", "kfac" and "empirical". Those of
    "kfra" are the mean of what each micro-batch's own recursion gives.

        curvatures.append(curvature)              # for each micro-batch
        optimizer.update(mean_grads, state, params, curvature=kfgn.average_curvature(curvatures))

    Raises:
      OptionError: there is nothing to average, or not only curvatures, or they
        were made with different settings.
    """
    curvatures = list(curvatures)
    if not curvatures or not all(isinstance(c, Curvature) for c in curvatures):
        found = ", ".join(type(c).__name__ for c in curvatures) or "nothing"
        raise OptionError(f"expected one kfgn.Curvature or more to average, found {found}")
    first, count = curvatures[0].settings, len(curvatures)
    for other in (c.settings for c in curvatures[1:]):
        names = [f.name for f in dataclasses.fields(first)]
        differing = [n for n in names if getattr(first, n) != getattr(other, n)]
        if differing:
            found = ", ".join(
                f"{n}={getattr(first, n)!r} and {n}={getattr(other, n)!r}" for n in differing
            )
            raise OptionError(
                f"curvatures of different settings have no average, found {found}; make all of "
                "them with one function of kfgn.value_grad_and_curvature."
            )

    def mean(*leaves: Array) -> Array:
        return sum(leaves[1:], start=leaves[0]) / count

    numbers = [(c.factors, c.value, c.gradient) for c in curvatures]
    factors, value, gradient = jax.tree.map(mean, *numbers)
    return Curvature(
        factors=factors,
        value=value,
        gradient=gradient,
        linearized=Partial(_Each(), [c.linearized for c in curvatures]),
        output_product=Partial(_MeanProduct(), [c.output_product for c in curvatures]),
        displaced=Partial(_Mean(), [c.displaced for c in curvatures]),
        settings=first,
    )


# Frozen and without fields: equal wherever they appear in a tree's structure.


@dataclasses.dataclass(frozen=True)
class _Each:
    def __call__(self, parts: list[Partial], direction: Any) -> Array:
        """The outputs' changes of all micro-batches, one after another."""
        return jnp.concatenate([part(direction) for part in parts])


@dataclasses.dataclass(frozen=True)
class _MeanProduct:
    def __call__(self, parts: list[Partial], u: Array, v: Array) -> Array:
        pairs = zip(jnp.split(u, len(parts)), jnp.split(v, len(parts)), strict=True)
        products = [part(a, b) for part, (a, b) in zip(parts, pairs, strict=True)]
        return sum(products[1:], start=products[0]) / len(parts)


@dataclasses.dataclass(frozen=True)
class _Mean:
    def __call__(self, parts: list[Partial], direction: Any) -> Array:
        values = [part(direction) for part in parts]
        return sum(values[1:], start=values[0]) / len(parts)
