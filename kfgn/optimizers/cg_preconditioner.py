"""What Hessian-free optimization preconditions by: diagonals, and Kronecker factors.

With the damping λ and the objective's l2 η, conjugate gradients on
`G + (λ + η) I` are preconditioned by the inverse of

    "diagonal"               (diag(F) + (λ + η) I)^power,  F the empirical Fisher
    "gauss_newton_diagonal"  (diag(G) + (λ + η) I)^power
    "kronecker"              Q ⊗ G + (λ + η) I,  in every layer

of which the second is the damped matrix itself where G is diagonal and the power 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kfgn.base.checks import check_choice, is_zero
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.kronecker import eigen
from kfgn.base.trees import named_leaves
from kfgn.base.types import Array, Named, Number, PyTree
from kfgn.curvature.batch import Curvature
from kfgn.curvature.factors import Factors
from kfgn.curvature.operators import empirical_fisher, gauss_newton
from kfgn.objective.objective import Objective
from kfgn.optimizers.damping import Damping
from kfgn.optimizers.layer_blocks import LayerBlocks
from kfgn.optimizers.preconditioner import Preconditioner

DIAGONALS = ("diagonal", "gauss_newton_diagonal")
PRECONDITIONERS = (None, *DIAGONALS, "kronecker")


def diagonal_weights(
    name: str, objective: Objective, params: PyTree, batch: Any, gradient: Named
) -> Named:
    """One of the `DIAGONALS`, for the leaves in a gradient, by name."""
    operator = empirical_fisher if name == "diagonal" else gauss_newton
    weights = named_leaves(operator(objective).diagonal_by_parameter(params, batch))
    if missing := [n for n in gradient if n not in weights]:
        raise ParameterError(f"params lack {', '.join(map(repr, missing))}, found {list(weights)}")
    return {n: weights[n] for n in gradient}


def diagonal_solve(weights: Named, damping: Array, power: Any) -> Callable[[Named], Named]:
    """`r -> (diag(weights) + damping I)^-power r`."""
    scales = {
        n: (w + damping.astype(w.dtype)) ** jnp.asarray(power).astype(w.dtype)
        for n, w in weights.items()
    }
    return lambda r: {n: x / scales[n].astype(x.dtype) for n, x in r.items()}


def kronecker_solve(
    preconditioner: Preconditioner, curvature: Curvature, damping: Array, leaves: Named
) -> Callable[[Named], Named]:
    """`r -> (Q ⊗ G + damping I)^-1 r` for the layers among the leaves, by one inversion."""
    blocks = preconditioner.blocks
    names = [*blocks.present(leaves), *blocks.diagonals(leaves)]
    parts: Named = {name: curvature.factors[name] for name in names}
    if preconditioner.inverse == "eigen":
        parts = {n: eigen(*f) if isinstance(f, Factors) else f for n, f in parts.items()}
    inverses = preconditioner.invert(parts, damping)

    def solve(r: Named) -> Named:
        solved = preconditioner.apply(inverses, damping, r)
        return {n: x.astype(r[n].dtype) for n, x in solved.items()}

    return solve


def check_preconditioner(
    name: str | None, blocks: LayerBlocks | None, damping: Damping, l2: Number
) -> None:
    """Raises OptionError for a preconditioner that is unknown, or may be singular."""
    check_choice("preconditioner", name, PRECONDITIONERS)
    if name == "kronecker" and blocks is None:
        raise OptionError(
            'preconditioner "kronecker" needs '
            "blocks=kfgn.layers.find_blocks(objective, params, batch)"
        )
    if name is not None and is_zero(damping.least) and is_zero(l2):
        raise OptionError(
            f"preconditioner {name!r} needs a positive damping, or l2: what it inverts "
            f"may be singular; found {damping!r}"
        )
