"""What a model's jaxpr on a batch says of noise: random bits, and roundoff."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from kfgn.model.program.equations import Var, bodies, variables
from kfgn.model.program.primitives import RANDOM


def draws_for_batch(jaxpr: jex.Jaxpr, of_batch: Iterable[Var]) -> bool:
    """Whether random bits are drawn from a key that does not depend on the inputs."""
    of_batch = set(of_batch)
    for equation in jaxpr.eqns:
        depends = any(v in of_batch for v in variables(equation.invars))
        if equation.primitive.name in RANDOM and not depends:
            return True
        for body in bodies(equation):
            inside = set(body.invars)
            if len(body.invars) == len(equation.invars):
                pairs = zip(body.invars, equation.invars, strict=True)
                inside = {v for v, atom in pairs if of_batch.intersection(variables([atom]))}
            if draws_for_batch(body, inside):
                return True
        if depends:
            of_batch.update(equation.outvars)
    return False


def coarsest(jaxprs: Iterable[jex.Jaxpr]) -> float:
    """The largest roundoff among the floating-point types inside of a model."""

    def epsilons(jaxpr: jex.Jaxpr) -> Iterator[float]:
        for equation in jaxpr.eqns:
            for v in equation.outvars:
                dtype: Any = getattr(v.aval, "dtype", bool)  # of what has none, such as a token
                if jnp.issubdtype(dtype, jnp.inexact):
                    yield float(jnp.finfo(dtype).eps)
            for body in bodies(equation):
                yield from epsilons(body)

    found = (eps for jaxpr in jaxprs for eps in epsilons(jaxpr))
    return max(found, default=float(jnp.finfo(jnp.float32).eps))
