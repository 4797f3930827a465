"""``python -m benchmarks peers``: kfgn beside optax's optimizers, for the same time each.

The paper's autoencoder on one data set: KFRA and KFAC with default settings; Adam, AdamW, Muon and
Sophia at several learning rates each, and at further ones while the best lies at the end of those
tried; L-BFGS with its line search on every batch. All have the same start, the same batches in the
same order, the same machine and the same seconds of updates (compilation and evaluation left out).
Other seeds have the best rates of the first one.
kfac-jax, which has a training loop of its own, runs in an environment of its own, made where there
is none yet, or is skipped with the reason (--no-kfac-jax leaves it out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import optax
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.experiments.peers import outside
from benchmarks.harness import race, tasks
from benchmarks.harness.arguments import (
    all_seeds,
    number,
    options,
    positive_int,
    positive_number,
    whole,
    widths,
)
from benchmarks.harness.display import table
from benchmarks.harness.experiment import Experiment, experiment
from benchmarks.harness.models import ENCODER
from benchmarks.harness.optimizers import Optimizer, second_order, with_gradient
from benchmarks.harness.plots import against, curve

# Makers of optax optimizers and the rates that are tried first.
TRIED: dict[str, tuple[Callable[[float], Any], tuple[float, ...]]] = {
    "adam": (optax.adam, (3e-4, 1e-3, 3e-3)),
    "adamw": (optax.adamw, (3e-4, 1e-3, 3e-3)),
    "muon": (optax.contrib.muon, (1e-2, 3e-2, 1e-1)),
    "sophia": (optax.contrib.sophia, (3e-5, 1e-4, 3e-4)),
}
KFAC_JAX = "kfac-jax, damping"  # and the value
BETWEEN = math.sqrt(10)  # a further rate and the last


def main(arguments: Sequence[str]) -> None:
    """Trains all, prints the table and writes everything down."""
    given = _parse(arguments)
    task = tasks.autoencoder(given.data, given.data_dir, given.layers, given.batch_size, given.l2)
    contestants = _contestants(task.objective, task.start(given.seed), task.example_batch)
    dampings = () if given.no_kfac_jax else outside.DAMPINGS
    total = len(contestants) + len(dampings)
    total += (given.seeds - 1) * (len(TRIED) + 3 + bool(dampings))
    with experiment("peers", arguments, given, total) as run:
        trainer = _Trainer(task, contestants, given, run)
        kfac_jax = trainer.first_seed(dampings)
        for seed in all_seeds(given)[1:]:
            trainer.further_seed(seed)
        runs, said = trainer.runs, {"kfac-jax": kfac_jax} if kfac_jax else {}
        shown = _table(runs, given.seconds, kfac_jax)
        run.record(runs, [shown], {"losses": _plot(runs, given.data)}, said)


def _parse(arguments: Sequence[str]) -> Any:
    parser = options("peers", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", default="mnist", help="curves, mnist, faces, digits or fashion_mnist (mnist)")
    add("--seconds", type=positive_number, default=25.0, help="of updates, for each (25)")
    add("--layers", type=widths, default=ENCODER, help="of the encoder (1000,500,250,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--further", type=whole, default=3, help="rates tried beyond the first, at most (3)")
    add("--seeds", type=positive_int, default=3, help="of each at its best rate (3)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    add("--no-kfac-jax", action="store_true", help="leave out kfac-jax")
    return parser.parse_args(arguments)


class _Trainer:
    """Trains one after the other; `runs` has the points of every seed by name."""

    def __init__(
        self, task: tasks.Task, contestants: dict[str, Optimizer], given: Any, run: Experiment
    ) -> None:
        self.task, self.contestants, self.given, self.run = task, contestants, given, run
        self.runs: dict[str, list[list[race.Point]]] = {}
        self.versions: dict[str, str] = {}  # of kfac-jax and its jax

    def first_seed(self, dampings: Sequence[float]) -> str | None:
        """Tunes every kind; returns the versions of kfac-jax, or why it was skipped."""
        seed = self.given.seed
        for name in list(self.contestants):
            self.train(name, seed)
        for kind, (make, rates) in TRIED.items():
            ends = {rate: _end(self.runs[f"{kind} {rate:g}"]) for rate in rates}
            for _ in range(self.given.further):
                rate = _next_rate(ends)
                if rate is None:
                    break
                label = f"{kind} {rate:g}"
                self.contestants[label] = with_gradient(label, self.task.objective, make(rate))
                self.run.ticker.expect(1)
                self.train(label, seed)
                ends[rate] = _end(self.runs[label])
        try:
            for damping in dampings:
                self.train(f"{KFAC_JAX} {damping:g}", seed)
        except outside.Skipped as reason:
            self.run.tick(f"kfac-jax is skipped: {reason}")
            return f"skipped: {reason}"
        return ", ".join(f"{n} {v}" for n, v in self.versions.items()) or None

    def further_seed(self, seed: int) -> None:
        """Every kind at the rate that was its best for the first seed."""
        for name in _best(self.runs).values():
            try:
                self.train(name, seed)
            except outside.Skipped as reason:
                self.run.tick(f"kfac-jax is skipped: {reason}")

    def train(self, name: str, seed: int) -> None:
        """One run, or what an interrupted command measured of it."""
        own = "data", "seconds", "layers", "batch_size", "l2"
        what = {**{key: getattr(self.given, key) for key in own}, "name": name, "seed": seed}
        train = self._kfac_jax if name.startswith(KFAC_JAX) else self._ours
        found, versions = self.run.measure(what, lambda: train(name, seed))
        self.versions |= versions
        self.runs.setdefault(name, []).append(race.points(found))
        self.run.tick(f"{name}: {self.runs[name][-1][-1].loss:.2f}")

    def _ours(self, name: str, seed: int) -> tuple[list[race.Point], dict[str, str]]:
        made, most, every = self.contestants[name], 10**6, _every(name)
        return race.points_of(made, self.task, most, every, seed, self.given.seconds), {}

    def _kfac_jax(self, name: str, seed: int) -> tuple[list[race.Point], dict[str, str]]:
        task, damping = self.task, float(name.rpartition(" ")[2])
        start, loss = task.start(seed), task.dataset.loss
        return outside.kfac_jax_run(
            task.images, start, loss, damping, seed, self.given, tasks.EVALUATED
        )


def _end(seeds: Sequence[Sequence[race.Point]]) -> float:
    """The last loss of the first seed, infinite where it is lost."""
    loss = seeds[0][-1].loss
    return loss if math.isfinite(loss) else math.inf


def _next_rate(ends: dict[float, float]) -> float | None:
    """The rate beyond the best, where that is the least or the greatest of those tried."""
    best = min(ends, key=lambda rate: ends[rate])
    if best == max(ends):
        return float(f"{best * BETWEEN:.1g}")
    return float(f"{best / BETWEEN:.1g}") if best == min(ends) else None


def _every(name: str) -> int:
    """Updates between evaluations: about as much time, whatever an update costs."""
    return 10 if name in ("kfra", "kfac", "l-bfgs") else 40


def _contestants(objective: Any, params: Any, batch: Any) -> dict[str, Optimizer]:
    found = {name: second_order(name, objective, params, batch, {}) for name in ("kfra", "kfac")}
    for name, (make, rates) in TRIED.items():
        for rate in rates:
            label = f"{name} {rate:g}"
            found[label] = with_gradient(label, objective, make(rate))
    found["l-bfgs"] = with_gradient("l-bfgs", objective, optax.lbfgs())
    return found


def _best(runs: dict[str, Any]) -> dict[str, str]:
    """The best of every kind of optimizer, by the first seed's last loss."""
    best: dict[str, str] = {}
    for name, seeds in runs.items():
        kind = name.split()[0].rstrip(",")
        if kind not in best or _end(seeds) < _end(runs[best[kind]]):
            best[kind] = name
    return best


def _table(runs: dict[str, Any], seconds: float, kfac_jax: str | None) -> Table:
    best = set(_best(runs).values())
    lines = []
    for name, (points, *others) in runs.items():
        half = next(p for p in points if p.seconds >= points[-1].seconds / 2)
        last = points[-1]
        label = f"{name} *" if name in best else name
        each = 1e3 * last.seconds / max(last.update, 1)
        ends = ", ".join(f"{other[-1].loss:.2f}" for other in others) or None
        lines.append(
            [label, last.update, f"{each:.0f}", f"{half.loss:.2f}", f"{last.loss:.2f}", ends]
        )
    title = f"Training loss after {seconds:g} s of updates (*: the best rate)"
    if kfac_jax:
        title += f"; {kfac_jax}"
    columns = ["optimizer", "updates", "ms/update", "half way", "end", "other seeds"]
    return table(title, columns, lines)


def _plot(runs: dict[str, Any], data: str) -> Figure:
    curves = [curve(name, runs[name][0]) for name in _best(runs).values()]
    title = f"Autoencoder on {data}: every optimizer at its best rate"
    figure, grid = against(curves, title=title)
    grid[0, 0].set_xscale("symlog", linthresh=10)
    return figure
