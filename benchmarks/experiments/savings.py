"""``python -m benchmarks savings``: what saves time, and what that costs.

KFAC trains an autoencoder on small batches with its factors whole, in blocks of three rows for each
example, as `kfgn.make` has them, and of one; and the suite's residual network with the Q of its
convolutions from all examples, from those that give four rows for each of Q's, as `kfgn.make` has
it, and from a quarter of those. Every update is timed by itself.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.experiments.suite.tasks import TASKS
from benchmarks.harness import tasks
from benchmarks.harness.arguments import options, positive_int, widths
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment

LOOKS = 3  # at the loss, evenly over the updates
Step = Callable[..., Any]


class Run(NamedTuple):
    """One training."""

    task: str
    changed: str  # what is not as `kfgn.make` has it
    losses: list[float]
    seconds: list[float]  # of every update


class Trained(NamedTuple):
    """What is trained on: parameters, and what draws batches and evaluates."""

    name: str
    objective: Any
    params: Any
    draw: Callable[[int], Any]
    evaluate: Callable[[Any], Any]
    updates: int


def main(arguments: Sequence[str]) -> None:
    """Trains all, prints the table and writes everything down."""
    parser = options("savings", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", default="mnist", help="of the autoencoder (mnist)")
    add("--layers", type=widths, default=(1000, 500, 250, 30), help="(1000,500,250,30)")
    add("--batches", type=widths, default=(64, 125, 250), help="batch sizes (64,125,250)")
    add("--updates", type=positive_int, default=150, help="of the autoencoder (150)")
    add("--conv-updates", type=positive_int, default=60, help="of the residual network (60)")
    given = parser.parse_args(arguments)
    cases: list[tuple[Callable[[], Trained], str, dict[str, dict[str, Any]]]] = [
        (functools.partial(_autoencoder, given, size), f"batch {size}", _blocks(size))
        for size in given.batches
    ]
    cases.append((functools.partial(_residual, given), "residual network", _rows()))
    with experiment("savings", arguments, given, sum(len(own) for *_, own in cases)) as run:
        runs = []
        for make, name, settings in cases:
            task = make()
            for changed, own in settings.items():
                what = {"task": name, "changed": changed, "updates": task.updates}
                what |= {"seed": given.seed, "data": given.data, "layers": list(given.layers)}
                found = run.measure(what, functools.partial(_train, task, own, given.seed))
                runs.append(Run(name, changed, *found))
                run.tick(f"{name}, {changed}: {runs[-1].losses[-1]:.4g}")
        run.record([r._asdict() for r in runs], [_table(runs)], {"savings": _plot(runs)})


def _blocks(size: int) -> dict[str, dict[str, Any]]:
    split = {"large_factors": "split"}
    return {
        "factors whole": {"large_factors": "raise"},
        "blocks": {**split, "factor_limit": max(3 * size, 256)},
        "blocks a third": {**split, "factor_limit": max(size, 256)},
    }


def _rows() -> dict[str, dict[str, Any]]:
    return {"Q of all": {"activation_rows": None}, "as made": {}, "Q of a quarter of those": {
        "activation_rows": 1}}  # fmt: skip


def _autoencoder(given: Any, size: int) -> Trained:
    task = tasks.autoencoder(given.data, given.data_dir, given.layers, size, 1e-5)
    batches = task.batches(given.seed)
    drawn: list[Any] = []  # all see the same

    def draw(update: int) -> Any:
        while len(drawn) <= update:
            drawn.append(jax.tree.map(jnp.asarray, next(batches)))
        return drawn[update]

    params, name = task.start(given.seed), f"batch {size}"
    return Trained(name, task.objective, params, draw, task.evaluate, given.updates)


def _residual(given: Any) -> Trained:
    task, key = TASKS["resnet"](given.seed, given.data_dir).task, jax.random.key(given.seed + 1)
    draw = jax.jit(lambda update: task.draw(jax.random.fold_in(key, update), task.params))
    whole = task.objective, task.params, draw, jax.jit(task.evaluate), given.conv_updates
    return Trained("residual network", *whole)


def _train(task: Trained, changed: dict[str, Any], seed: int) -> tuple[list[float], list[float]]:
    """Losses, and the seconds of every update."""
    params, key = task.params, jax.random.key(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kfgn.errors.CostWarning)  # the table says it
        made = kfgn.make(task.objective, params, task.draw(0), method="kfac", **changed)
    optimizer, curvature_fn = made

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    program = jax.jit(step).lower(params, state, task.draw(0), key).compile()
    losses, seconds = [], []
    for update in range(task.updates):
        batch = task.draw(update)
        begun = time.perf_counter()
        params, state = program(params, state, batch, jax.random.fold_in(key, update))
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - begun)
        if (update + 1) % -(-task.updates // LOOKS) == 0 or update + 1 == task.updates:
            losses.append(float(task.evaluate(params)))
    return losses, seconds


def _plot(runs: list[Run]) -> Figure:
    """Losses against seconds, beside each other."""
    names = list(dict.fromkeys(r.task for r in runs))
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for r in (r for r in runs if r.task == name):
            looks = np.array_split(np.cumsum(r.seconds), len(r.losses))
            axes.plot([own[-1] for own in looks], r.losses, "o-", label=r.changed)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("seconds of updates")
        axes.legend(fontsize="small")
        axes.grid(True, alpha=0.25)
    return figure


def _table(runs: list[Run]) -> Table:
    lines = []
    for r in runs:
        first = next(other for other in runs if other.task == r.task)
        times = [np.mean(r.seconds) / np.mean(first.seconds), r.seconds[0] / first.seconds[0]]
        losses = " ".join(f"{x:.4g}" for x in r.losses)
        lines.append([r.task, r.changed, losses, *(f"{x:.2f}" for x in times)])
    head = ["task", "", "losses", "time of all updates", "of the first"]
    return table("KFAC with and without what saves time", head, lines)
