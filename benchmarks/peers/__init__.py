"""``python -m benchmarks peers``: kfgn beside optax's optimisers, for the same time each.

The paper's autoencoder on one data set: KFRA and KFAC with default settings; Adam, AdamW, Muon and
Sophia at several learning rates each, and at further ones while the best lies at the end of those
tried; L-BFGS with its line search on every batch. All have the same start, the same batches in the
same order, the same machine and the same seconds of updates (compilation and evaluation left out).
kfac-jax, which has a training loop of its own, runs in an environment of its own, made where there
is none yet, or is skipped with the reason (--no-kfac-jax leaves it out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import experiment, race, task
from benchmarks.arguments import number, positive_int, positive_number, whole, widths
from benchmarks.models import ENCODER
from benchmarks.optimizers import Optimizer, second_order
from benchmarks.peers import outside

# Makers of optax optimisers and the rates that are tried first.
TRIED: dict[str, tuple[Callable[[float], Any], tuple[float, ...]]] = {
    "adam": (optax.adam, (3e-4, 1e-3, 3e-3)),
    "adamw": (optax.adamw, (3e-4, 1e-3, 3e-3)),
    "muon": (optax.contrib.muon, (1e-2, 3e-2, 1e-1)),
    "sophia": (optax.contrib.sophia, (3e-5, 1e-4, 3e-4)),
}
BETWEEN = math.sqrt(10)  # a further rate and the last


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all, prints the table and writes everything down."""
    parser = experiment.options("peers", __doc__)
    add = parser.add_argument
    add("--data", default="mnist", help="curves, mnist, faces, digits or fashion_mnist (mnist)")
    add("--seconds", type=positive_number, default=25.0, help="of updates, for each (25)")
    add("--layers", type=widths, default=ENCODER, help="of the encoder (1000,500,250,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--further", type=whole, default=3, help="rates tried beyond the first, at most (3)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    add("--no-kfac-jax", action="store_true", help="leave out kfac-jax")
    options = parser.parse_args(arguments)
    given = task.autoencoder(
        options.data, options.data_dir, options.layers, options.batch_size, options.l2
    )
    objective, params = given.objective, given.start(options.seed)
    console, runs = Console(), {}
    contestants = _contestants(objective, params, given.example_batch)
    with experiment.progress(console, "peers", len(contestants) + 1) as ticker:

        def train(name: str, optimizer: Optimizer) -> float:
            runs[name], _ = race.run(
                optimizer, params, given.batches(options.seed), given.evaluate, 10**6,
                eval_every=_every(name), seconds=options.seconds,
            )  # fmt: skip
            ticker.step(f"{name}: {runs[name][-1].loss:.2f}")
            return runs[name][-1].loss

        for name, optimizer in contestants.items():
            train(name, optimizer)
        for kind, (make, rates) in TRIED.items():
            ends = {rate: runs[f"{kind} {rate:g}"][-1].loss for rate in rates}
            for _ in range(options.further):
                rate = _next_rate(ends)
                if rate is None:
                    break
                ticker.expect(1)
                label = f"{kind} {rate:g}"
                ends[rate] = train(label, _of_optax(label, make(rate), objective))
        others = {} if options.no_kfac_jax else _kfac_jax(given, options)
        runs |= others.pop("runs", {})
        ticker.step(others.get("kfac-jax", ""))
    settings = {key: str(value) for key, value in vars(options).items() if key != "data_dir"}
    settings |= others
    shown = _table(runs, options.seconds, others.get("kfac-jax"))
    experiment.record(options.out, "peers", arguments, settings, runs, [shown], console)
    _plot(options.out / "losses.png", runs, options.data)
    return 0


def _kfac_jax(given: task.Task, options: Any) -> dict[str, Any]:
    """Its runs and versions, or the reason why there are none."""
    try:
        start = given.start(options.seed)
        found = outside.kfac_jax_runs(given.images, start, given.loss, options, task.EVALUATED)
    except outside.Skipped as reason:
        return {"kfac-jax": f"skipped: {reason}"}
    runs = {name: points for name, (points, _) in found.items()}
    versions = next(iter(found.values()))[1]
    return {"runs": runs, "kfac-jax": ", ".join(f"{n} {v}" for n, v in versions.items())}


def _next_rate(ends: dict[float, float]) -> float | None:
    """The rate beyond the best, where that is the least or the greatest of those tried."""
    best = min(ends, key=lambda rate: ends[rate] if math.isfinite(ends[rate]) else math.inf)
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
            found[label] = _of_optax(label, make(rate), objective)
    found["l-bfgs"] = _of_optax("l-bfgs", optax.lbfgs(), objective)
    return found


def _of_optax(name: str, transformation: Any, objective: Any) -> Optimizer:
    """An optimiser that may ask for the objective itself: for a line search, or its Hessian."""

    def step(params, state, batch, key):
        del key
        loss, grads = jax.value_and_grad(objective)(params, batch)
        extra: dict[str, Any] = {}
        if name.startswith("sophia"):
            extra = {"obj_fn": lambda p: objective(p, batch)}
        if name == "l-bfgs":
            extra = {"value": loss, "grad": grads, "value_fn": lambda p: objective(p, batch)}
        updates, state = transformation.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, loss

    return Optimizer(name, transformation.init, step)


def _best(runs: dict[str, Any]) -> dict[str, str]:
    """The best run of every kind of optimiser, by its last loss."""
    best: dict[str, str] = {}
    for name, points in runs.items():
        kind = name.split()[0].rstrip(",")
        if kind not in best or points[-1].loss < runs[best[kind]][-1].loss:
            best[kind] = name
    return best


def _table(runs: dict[str, Any], seconds: float, kfac_jax: str | None) -> Any:
    best = set(_best(runs).values())
    lines = []
    for name, points in runs.items():
        half = next(p for p in points if p.seconds >= points[-1].seconds / 2)
        last = points[-1]
        label = f"{name} *" if name in best else name
        each = 1e3 * last.seconds / max(last.update, 1)
        lines.append([label, last.update, f"{each:.0f}", f"{half.loss:.2f}", f"{last.loss:.2f}"])
    title = f"Training loss after {seconds:g} s of updates (*: the best rate)"
    if kfac_jax:
        title += f"; {kfac_jax}"
    return experiment.table(title, ["optimiser", "updates", "ms/update", "half way", "end"], lines)


def _plot(path: Path, runs: dict[str, Any], data: str) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_update, by_time = figure.subplots(1, 2, sharey=True)
    for name in _best(runs).values():
        points = runs[name]
        for axes, field in ((by_update, "update"), (by_time, "seconds")):
            axes.plot([getattr(p, field) for p in points], [p.loss for p in points], label=name)
    for axes, label in ((by_update, "updates"), (by_time, "seconds of training")):
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
    by_update.set_xscale("symlog", linthresh=10)
    by_update.set_ylabel("training loss per example")
    figure.suptitle(f"Autoencoder on {data}: every optimiser at its best rate")
    figure.savefig(path, dpi=130)
