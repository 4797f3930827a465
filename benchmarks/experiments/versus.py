"""``python -m benchmarks versus``: KFRA beside KFAC, setting by setting and seed by seed.

Both train the same autoencoder from the same starts on the same batches; a row is how much higher
KFRA's training loss is than KFAC's, half way and at the end, as a mean over seeds with its
range: below zero KFRA leads. What changes from row to row is the data set, the number of updates,
the batch size, the thresholds of the damping, the moving average, KFAC's samples, or the preset.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import kfgn
from benchmarks import BenchmarkError
from benchmarks.datasets import NAMES
from benchmarks.harness import experiment, race, task
from benchmarks.harness.arguments import names, positive_int, widths
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.optimizers import Optimizer, closest, second_order
from benchmarks.harness.plots import COLOURS

METHODS = ("kfra", "kfac")
EVALUATIONS = 20
LONGER = 5  # times as many updates


class Case(NamedTuple):
    """What differs from the defaults."""

    data: str
    updates: int
    batch_size: int
    options: dict[str, Any] | None = None
    samples: int = 1  # of KFAC


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all pairs, prints the table and writes everything down."""
    parser = experiment.options("versus", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", type=names, default=("mnist", "curves", "faces"), help="(mnist,curves,faces)")
    add("--updates", type=positive_int, default=150, help="(150)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="(250,125,60,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--batches", type=widths, default=(250, 4000), help="other batch sizes (250,4000)")
    add("--seeds", type=positive_int, default=3, help="(3)")
    options = parser.parse_args(arguments)
    for name in options.data:
        if name not in NAMES:
            raise closest("data set", name, NAMES)
    if not options.data:
        raise BenchmarkError("--data needs a data set")
    console, measured = Console(), {}
    cases = _cases(options)
    with (
        experiment.ledger(options) as ledger,
        experiment.progress(console, "versus", len(cases)) as ticker,
    ):
        for name, case in cases.items():
            measured[name] = _pairs(case, options, ledger)
            ticker.step(f"{name}: {_share(measured[name])}")
        said, tables = experiment.settings(options), [_table(measured)]
        experiment.record(options.out, "versus", arguments, said, measured, tables, console)
    _plot(options.out / "versus.png", measured)
    return 0


def _cases(options: Any) -> dict[str, Case]:
    first, *others = options.data
    base = Case(first, options.updates, options.batch_size)
    cases = {f"{first}, defaults": base}
    cases |= {f"{name}, defaults": base._replace(data=name) for name in others}
    cases[f"{first}, {LONGER} x the updates"] = base._replace(updates=LONGER * options.updates)
    for size in options.batches:
        cases[f"{first}, batch {size}"] = base._replace(batch_size=size)
    for samples in (2, 5):
        cases[f"{first}, {samples} samples"] = base._replace(samples=samples)
    changed: dict[str, dict[str, Any]] = {
        "thresholds 0.75, 0.75": {
            "step_damping": kfgn.transforms.LevenbergMarquardt(2.0, thresholds=(0.75, 0.75))
        },
        "no moving average": {"decay": None},
        "exact damped inverse": {"inverse": "eigen"},
        "the paper's preset": kfgn.transforms.PRESETS["paper"],
    }
    return cases | {f"{first}, {n}": base._replace(options=o) for n, o in changed.items()}


def _pairs(case: Case, options: Any, ledger: Ledger) -> dict[str, list[list[race.Point]]]:
    """The points of every seed's run, by method."""
    made_of = task.autoencoder(case.data, options.data_dir, options.layers, case.batch_size, 1e-5)
    start = made_of.start(options.seed)
    every, found = max(1, case.updates // EVALUATIONS), {}
    for method in METHODS:
        samples = case.samples if method == "kfac" else 1
        made = second_order(
            method, made_of.objective, start, made_of.example_batch, case.options or {}, samples
        )

        def train(seed: int, made: Optimizer = made) -> list[race.Point]:
            own = made_of.start(seed), made_of.batches(seed), made_of.evaluate
            return race.run(made, *own, case.updates, every, seed)[0]

        what = {**case._asdict(), "layers": options.layers, "method": method}
        found[method] = [
            race.points(ledger.measure({**what, "seed": seed}, functools.partial(train, seed)))
            for seed in experiment.all_seeds(options)
        ]
    return found


def _excess(runs: dict[str, list[list[race.Point]]], part: float) -> np.ndarray:
    """KFRA's loss over KFAC's, less one, after a part of the updates; one for each seed."""
    ratios = []
    for kfra, kfac in zip(*(runs[method] for method in METHODS), strict=True):
        update = part * kfra[-1].update
        ratios.append(_at(kfra, update) / _at(kfac, update) - 1)
    return np.asarray(ratios)


def _at(points: Sequence[race.Point], update: float) -> float:
    return next(point.loss for point in points if point.update >= update)


def _share(runs: dict[str, list[list[race.Point]]]) -> str:
    return f"{_excess(runs, 1.0).mean():+.2%}"


def _table(measured: dict[str, Any]) -> Any:
    lines = []
    for name, runs in measured.items():
        cells: list[Any] = [name, runs["kfra"][0][-1].update]
        for part in (0.5, 1.0):
            excess = _excess(runs, part)
            cells.append(f"{excess.mean():+.2%} ({excess.min():+.2%} to {excess.max():+.2%})")
        cells += [f"{np.mean([p[-1].loss for p in runs[m]]):.3f}" for m in METHODS]
        cells += [f"{1e3 * runs[m][0][-1].seconds / runs[m][0][-1].update:.0f}" for m in METHODS]
        lines.append(cells)
    columns = ["case", "updates", "half way", "end", *METHODS, *(f"{m}, ms" for m in METHODS)]
    title = "KFRA's training loss over KFAC's, less one: mean over seeds (range)"
    return experiment.table(title, columns, lines)


def _plot(path: Path, measured: dict[str, Any]) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for place, runs in enumerate(measured.values()):
        excess = 100 * _excess(runs, 1.0)
        colors = [COLOURS["kfra" if x < 0 else "kfac"] for x in excess]
        axes.scatter(excess, [place] * len(excess), c=colors)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xlabel("KFRA's training loss over KFAC's, %: every seed (red: KFRA leads)")
    axes.grid(True, alpha=0.25)
    figure.savefig(path, dpi=130)
