"""``python -m benchmarks stagger``: updates of even length, and what that does to the loss.

KFRA and KFAC train an autoencoder of the digits whose hidden layers all have one width, once with
all inverses refreshed at every fifth update and once by `stagger=True`, a few at each. Every update
is timed; factors are observed at every fifth, too, unless --observe says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.harness import tasks
from benchmarks.harness.arguments import options, positive_int
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.optimizers import second_order

METHODS = ("kfra", "kfac")
WARM = 10  # updates that are not looked at: all of them observe


class Run(NamedTuple):
    """One training, by update."""

    method: str
    stagger: bool
    seconds: list[float]
    losses: list[float]  # of the batch, before the update
    end: float  # the training loss at the end

    @property
    def unevenness(self) -> float:
        """The longest of five neighbours beside the median, of all such the median."""
        kept = np.array(self.seconds[WARM : len(self.seconds) // 5 * 5]).reshape(-1, 5)
        return float(np.median(kept.max(axis=1)) / np.median(kept))


def main(arguments: Sequence[str]) -> None:
    """Trains every method both ways, prints the table and writes everything down."""
    parser = options("stagger", __doc__)
    add = parser.add_argument
    add("--updates", type=positive_int, default=120, help="(120)")
    add("--width", type=positive_int, default=400, help="of four hidden layers (400)")
    add("--observe", type=positive_int, default=5, help="updates between looks at factors (5)")
    given = parser.parse_args(arguments)
    with experiment("stagger", arguments, given, 2 * len(METHODS)) as run:
        task = tasks.autoencoder("digits", given.data_dir, [given.width] * 2 + [30], 500, 1e-5)
        runs = []
        for method in METHODS:
            for stagger in (False, True):
                runs.append(_train(task, method, stagger, given))
                run.tick(f"{method} {runs[-1].unevenness:.2f}")
        measured = [{**r._asdict(), "unevenness": r.unevenness} for r in runs]
        run.record(measured, [_table(runs)], {"stagger": _plot(runs)})


def _train(task: tasks.Task, method: str, stagger: bool, given: Any) -> Run:
    params, chosen = task.start(given.seed), {"stagger": stagger}
    chosen["refresh_factors_every"] = given.observe
    optimizer = second_order(method, task.objective, params, task.example_batch, chosen)
    state, batches, key = optimizer.init(params), task.batches(given.seed), jax.random.key(0)
    step = jax.jit(optimizer.step).lower(params, state, task.example_batch, key).compile()
    seconds, losses = [], []
    for k in range(given.updates):
        batch = jax.tree.map(jnp.asarray, next(batches))
        begun = time.perf_counter()
        params, state, value = step(params, state, batch, jax.random.fold_in(key, k))
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - begun)
        losses.append(float(value))
    return Run(method, stagger, seconds, losses, float(task.evaluate(params)))


def _table(runs: list[Run]) -> Table:
    lines = [
        [r.method, "in turns" if r.stagger else "at once", f"{1000 * np.median(r.seconds):.1f}",
         f"{1000 * np.mean(r.seconds[WARM:]):.1f}", f"{r.unevenness:.2f}", f"{r.end:.2f}"]
        for r in runs
    ]  # fmt: skip
    head = ["", "inverses", "median ms", "mean ms", "longest of five / median", "training loss"]
    return table("Updates with inverses at once, and in turns", head, lines)


def _plot(runs: list[Run]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    times, losses = figure.subplots(1, 2)
    for run, color in zip(runs, ("tab:red", "tab:orange", "tab:blue", "tab:cyan"), strict=True):
        label, shown = run.method + ", in turns" * run.stagger, run.seconds[WARM : WARM + 25]
        times.plot(range(WARM, WARM + len(shown)), shown, "o-", color=color, label=label)
        losses.plot(run.losses, color=color, label=label)
    times.set(xlabel="update", ylabel="seconds")
    losses.set(xlabel="update", ylabel="loss of the batch", yscale="log")
    for axes in (times, losses):
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    return figure
