"""The second open question of `fashion`: few images, growing depth.

scikit-learn's digits fit into one batch, so sampling plays no part: what differs between the
methods is how they bear gradients that vanish on the way back through logistic units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.datasets import load
from benchmarks.experiments.fashion.training import Classifier, Problem, Run, minimize, train
from benchmarks.harness.optimizers import Optimizer, first_order, second_order

WIDTH = 50
RATES = {"gradient descent": ("sgd", (0.1, 1.0)), "Adam": ("adam", (1e-3, 1e-2))}
METHODS = (*RATES, "L-BFGS-B", "KFRA", "KFAC")


class Depth(NamedTuple):
    """What all methods made of one number of hidden layers."""

    hidden: int
    gradients: list[float]  # the norm of every kernel's gradient at the start, over the last one's
    runs: list[Run]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "hidden": self.hidden,
            "relative_gradients": self.gradients,
            "runs": [run.report() for run in self.runs],
        }


def measure(hidden: int, updates: int, seed: int, tick: Callable[[str], Any]) -> Depth:
    """Trains one depth by all methods, on all digits at once, without a penalty."""
    data = load("digits")
    everything = [(data.train, data.train_labels)]
    dev = (data.test, data.test_labels)
    problem = Problem(Classifier(hidden, WIDTH), 0.0, everything, dev, seed)
    runs = []
    for name in METHODS:
        runs.append(_run(name, problem, updates))
        tick(f"depth {hidden}, {name}")
    return Depth(hidden, relative_gradients(problem, hidden), runs)


def relative_gradients(problem: Problem, hidden: int) -> list[float]:
    """The gradient's norm at the kernels, first to last, relative to the last."""
    grads = jax.grad(problem.objective)(problem.params, problem.train)["params"]
    norms = [float(jnp.linalg.norm(grads[f"Dense_{k}"]["kernel"])) for k in range(hidden + 1)]
    return [norm / norms[-1] for norm in norms]


def _run(name: str, problem: Problem, updates: int) -> Run:
    if name == "L-BFGS-B":
        return minimize(problem, name, "l-bfgs-b", updates)
    if name in RATES:
        kind, rates = RATES[name]
        return _better(name, problem, updates, kind, rates)
    batch = problem.train
    method = second_order(name.lower(), problem.objective, problem.params, batch, {})
    return train(problem, method, [batch], iterations=updates, name=name)


def _better(name: str, problem: Problem, updates: int, kind: str, rates: Sequence[float]) -> Run:
    """The run at the rate with the lowest training loss at the end."""
    runs = []
    for rate in rates:
        optimizer: Optimizer = first_order(kind, problem.objective, rate)
        runs.append(train(problem, optimizer, [problem.train], iterations=updates, name=name))
        runs[-1].note = f"{runs[-1].note} rate {rate:g}".strip()
    finite = [run for run in runs if run.last.objective < float("inf")]
    return min(finite or runs, key=lambda run: run.last.objective)
