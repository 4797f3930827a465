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

import jax
import jax.numpy as jnp

from kfgn.base.checks import is_zero
from kfgn.base.errors import OptionError, ParameterError
from kfgn.base.kronecker import eigen
from kfgn.base.linalg import PRECISION
from kfgn.base.trees import named_leaves, with_leaves
from kfgn.curvature.batch import Curvature
from kfgn.curvature.exact import gauss_newton_diagonal
from kfgn.curvature.factors import Factors
from kfgn.curvature.forward_pass import linearize
from kfgn.curvature.per_example import mean_over
from kfgn.model.graph import Graph, build_graph
from kfgn.model.layer import Layer
from kfgn.objective.objective import Objective, check_batch
from kfgn.optimizers.conjugate_gradient import wide
from kfgn.optimizers.damping import Damping
from kfgn.optimizers.layer_blocks import LayerBlocks
from kfgn.optimizers.preconditioner import Preconditioner

Array = jax.Array
PyTree = Any
Named = dict[str, Any]

DIAGONALS = ("diagonal", "gauss_newton_diagonal")
PRECONDITIONERS = (None, *DIAGONALS, "kronecker")


def empirical_fisher_diagonal(objective: Objective, *, chunk_size: int = 32) -> Callable:
    """`(params, batch) -> mean_n (dE_n / dθ)^2`, a pytree like params, without l2.

    Where a kernel is used once per example, its gradient is an outer product
    `a_n g_n'`, and the mean of its square `mean_n a_n^2 (g_n^2)'` one product of
    matrices; elsewhere every example's gradient is formed.

    Args:
      objective: the objective.
      chunk_size: how many examples' gradients are held at once.
    """

    def diagonal(params, batch):
        inputs, targets = check_batch(batch)
        graph = build_graph(objective, params, inputs)
        once = {name: layer for name, layer in graph.layers.items() if _used_once(layer)}
        found = _squared_outer_products(objective, graph, params, inputs, targets, once)
        leaves = named_leaves(params)
        others = {n: leaf for n, leaf in leaves.items() if n not in found}

        def squares(example):
            one = jax.tree.map(lambda a: a[None], example)
            gradient = jax.grad(
                lambda p: objective.mean_loss(with_leaves(params, {**leaves, **p}), one)
            )(others)
            return {n: jnp.square(g.astype(wide(g))) for n, g in gradient.items()}

        if others:
            found.update(mean_over(squares, (inputs, targets), chunk_size))
        return with_leaves(params, {n: found[n] for n in leaves})

    return diagonal


def _used_once(layer: Layer) -> bool:
    """Whether every example meets the layer's kernel at one place."""
    return len(layer.uses) == 1 and layer.first.form.positions == 1 and not layer.indexed


def _squared_outer_products(
    objective: Objective, graph: Graph, params: PyTree, inputs: PyTree, targets: PyTree,
    layers: dict[str, Layer],
) -> Named:  # fmt: skip
    if not layers:
        return {}
    model = linearize(graph, objective, params, inputs, targets, with_probes=True)
    _, gradients = model.pull(model.loss.gradients(model.outputs, model.targets))
    found: Named = {}
    for name, layer in layers.items():
        a = layer.first.activations(model.values[layer.first.input], model.dtype)[:, :, 0]
        g = layer.first.pre_activations(gradients[name]).astype(model.dtype)[:, :, 0]
        mean = jnp.einsum("nsi,nso->sio", a**2, g**2, precision=PRECISION) / len(a)
        found.update(layer.from_matrix(mean.reshape(layer.matrix_shape)))
    return {n: x.astype(wide(x)) for n, x in found.items()}


def gauss_newton_diagonal_by_leaf(objective: Objective) -> Callable:
    """`(params, batch) -> diag(G)`, a pytree like params."""

    def diagonal(params, batch):
        graph = build_graph(objective, params, check_batch(batch)[0])
        found: Named = {}
        for name, values in gauss_newton_diagonal(objective)(params, batch).items():
            layer = graph.layers.get(name)
            found.update({name: values} if layer is None else layer.from_matrix(values))
        return with_leaves(params, {n: x.astype(wide(x)) for n, x in found.items()})

    return diagonal


def diagonal_weights(
    name: str, objective: Objective, params: PyTree, batch: Any, gradient: Named
) -> Named:
    """One of the `DIAGONALS`, for the leaves in a gradient, by name."""
    make = empirical_fisher_diagonal if name == "diagonal" else gauss_newton_diagonal_by_leaf
    weights = named_leaves(make(objective)(params, batch))
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


def check_preconditioner(name: Any, layers: LayerBlocks | None, damping: Any, l2: Any) -> None:
    """Raises OptionError for a preconditioner that is unknown, or may be singular."""
    if name not in PRECONDITIONERS:
        raise OptionError(
            f"preconditioner must be one of {', '.join(map(repr, PRECONDITIONERS))}, found {name!r}"
        )
    if name == "kronecker" and layers is None:
        raise OptionError(
            'preconditioner "kronecker" needs '
            "layers=kfgn.layers.find_blocks(objective, params, batch)"
        )
    least = damping.minimum if isinstance(damping, Damping) else damping
    if name is not None and is_zero(least) and is_zero(l2):
        raise OptionError(
            f"preconditioner {name!r} needs a positive damping, or l2: what it inverts "
            f"may be singular; found {damping!r}"
        )
