"""The third open question of `fashion`: what preconditioners do for Hessian-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import kfgn
from benchmarks.experiments.fashion.training import Arrays, Problem, Run, train
from benchmarks.harness.optimizers import Optimizer, with_curvature

# By the names in tables: nothing, the empirical Fisher's diagonal, the layers' factors.
PRECONDITIONERS = {"none": None, "diagonal": "diagonal", "Kronecker": "kronecker"}
DAMPINGS = (1.0, 0.1, 0.01, 0.001)  # at which iterations are counted; the penalty comes on top


def method_name(preconditioner: str) -> str:
    """What a run is called."""
    return f"HF, {preconditioner}"


def hessian_free(problem: Problem, name: str) -> Optimizer:
    """Hessian-free steps with the defaults of kfgn; the Kronecker factors are KFRA's."""
    objective, batch = problem.objective, problem.batches[0]
    transformation = optax.chain(
        kfgn.transforms.scale_by_conjugate_gradient(
            objective,
            preconditioner=PRECONDITIONERS[name],
            blocks=kfgn.layers.find_blocks(objective, problem.params, batch),
        ),
        optax.scale(-1.0),
    )
    return with_curvature(
        "kfra", objective, transformation, lambda batch, value, grads: {"batch": batch}
    )


def train_hessian_free(problem: Problem, name: str, seconds: float) -> Run:
    """As `train`, with the CG iterations of every update."""
    cg_iterations: list[int] = []
    dampings: list[float] = []

    def tell(state: Any) -> None:
        cg_iterations.append(int(state[0].iterations))
        dampings.append(float(state[0].damping))

    optimizer = hessian_free(problem, name)
    run = train(
        problem, optimizer, problem.batches, seconds=seconds, name=method_name(name), tell=tell
    )
    run.cg_iterations, run.damping = cg_iterations, dampings[-1] if dampings else None
    return run


def conditioned_iterations(
    problem: Problem, places: Mapping[str, Any], dampings: Sequence[float] = DAMPINGS
) -> dict[str, dict[str, list[int]]]:
    """CG iterations to the default tolerance, by place, preconditioner and damping."""
    objective, examples = problem.objective, problem.batches[0]
    blocks = kfgn.layers.find_blocks(objective, problem.params, examples)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfra")
    found: dict[str, dict[str, list[int]]] = {place: {} for place in places}
    for name, preconditioner in PRECONDITIONERS.items():

        def count(
            params: Any, batch: Arrays, damping: Any, kind: str | None = preconditioner
        ) -> jax.Array:
            solver = kfgn.transforms.scale_by_conjugate_gradient(
                objective, blocks=blocks, damping=damping, preconditioner=kind
            )
            (_, grads), curvature = curvature_fn(params, batch)
            _, state = solver.update(
                grads, solver.init(params), params, curvature=curvature, batch=batch
            )
            return state.iterations  # type: ignore[attr-defined]

        compiled = jax.jit(count)
        for place, params in places.items():
            found[place][name] = [
                int(compiled(params, examples, jnp.float32(damping))) for damping in dampings
            ]
    return found
