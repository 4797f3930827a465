"""``python -m benchmarks versus``: KFRA beside KFAC, setting by setting and seed by seed.

Both train the same autoencoder from the same starts on the same batches; a row is how much higher
KFRA's training loss is than KFAC's, half way and at the end, as a mean over seeds with its
range: below zero KFRA leads. What changes from row to row is the data set, the number of updates,
the batch size, the thresholds of the damping, the moving average, KFAC's samples, or the preset.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

import kfgn
from benchmarks.datasets import NAMES
from benchmarks.harness import race, tasks
from benchmarks.harness.arguments import all_seeds, options, positive_int, some_of, widths
from benchmarks.harness.display import table
from benchmarks.harness.experiment import Experiment, experiment
from benchmarks.harness.optimizers import second_order
from benchmarks.harness.plots import COLORS, dots

Runs = dict[str, list[list[race.Point]]]  # of every seed, by method
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


def main(arguments: Sequence[str]) -> None:
    """Trains all pairs, prints the table and writes everything down."""
    parser = options("versus", __doc__, resumable=True)
    add = parser.add_argument
    known = some_of("data set", NAMES)
    add("--data", type=known, default=("mnist", "curves", "faces"), help="(mnist,curves,faces)")
    add("--updates", type=positive_int, default=150, help="(150)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="(250,125,60,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--batches", type=widths, default=(250, 4000), help="other batch sizes (250,4000)")
    add("--seeds", type=positive_int, default=3, help="(3)")
    given = parser.parse_args(arguments)
    cases, measured = _cases(given), {}
    with experiment("versus", arguments, given, len(cases)) as run:
        for name, case in cases.items():
            measured[name] = _pairs(case, given, run)
            run.tick(f"{name}: {_excess(measured[name], 1.0).mean():+.2%}")
        run.record(measured, [_table(measured)], {"versus": _plot(measured)})


def _cases(given: Any) -> dict[str, Case]:
    first, *others = given.data
    base = Case(first, given.updates, given.batch_size)
    cases = {f"{first}, defaults": base}
    cases |= {f"{name}, defaults": base._replace(data=name) for name in others}
    cases[f"{first}, {LONGER} x the updates"] = base._replace(updates=LONGER * given.updates)
    for size in given.batches:
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


def _pairs(case: Case, given: Any, run: Experiment) -> Runs:
    task = tasks.autoencoder(case.data, given.data_dir, given.layers, case.batch_size, 1e-5)
    start, example = task.start(given.seed), task.example_batch
    every, found = max(1, case.updates // EVALUATIONS), {}
    for method in METHODS:
        sampled = {"samples": case.samples} if method == "kfac" else {}
        made = second_order(method, task.objective, start, example, case.options or {}, **sampled)
        train = functools.partial(race.points_of, made, task, case.updates, every)
        what = {**case._asdict(), "layers": given.layers, "method": method}
        found[method] = [
            race.points(run.measure({**what, "seed": seed}, functools.partial(train, seed)))
            for seed in all_seeds(given)
        ]
    return found


def _excess(runs: Runs, part: float) -> np.ndarray:
    """KFRA's loss over KFAC's, less one, after a part of the updates; one for each seed."""
    ratios = []
    for kfra, kfac in zip(*(runs[method] for method in METHODS), strict=True):
        update = part * kfra[-1].update
        ratios.append(_at(kfra, update) / _at(kfac, update) - 1)
    return np.asarray(ratios)


def _at(points: Sequence[race.Point], update: float) -> float:
    return next(point.loss for point in points if point.update >= update)


def _table(measured: Mapping[str, Runs]) -> Any:
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
    return table(title, columns, lines)


def _plot(measured: Mapping[str, Runs]) -> Figure:
    rows = {
        name: [([100 * x], COLORS["kfra" if x < 0 else "kfac"], None) for x in _excess(runs, 1.0)]
        for name, runs in measured.items()
    }
    label = "KFRA's training loss over KFAC's, %: every seed (red: KFRA leads)"
    figure, axes = dots(rows, label)
    axes.axvline(0, color="0.6", linewidth=0.8)
    return figure
