"""``python -m benchmarks ablations``: which of the defaults matter.

A smaller autoencoder trains with one setting changed at a time; every row is the training loss
after half of the updates and all of them, a mean over seeds. Batch sizes, widths and depths change
the problem itself: there, Adam's loss after as much time stands beside.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import kfgn
from benchmarks.harness import experiment, race, task
from benchmarks.harness.arguments import positive_int, widths
from benchmarks.harness.optimizers import first_order, second_order
from benchmarks.harness.plots import COLOURS

# What is changed, from the defaults of kfgn.kfra and kfgn.kfac.
SETTINGS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "no moving average": {"decay": None},
    "decay 0.5": {"decay": 0.5},
    "decay 0.95": {"decay": 0.95},
    "dampings from 150": {"step_damping": 150.0},
    "dampings from 0.1": {"step_damping": 0.1},
    "γ greedy from 1, not τ": {"factor_damping": 1.0},
    "τ fixed": {"step_damping": kfgn.transforms.Fixed(2.0)},
    "thresholds 0.75, 0.75": {
        "step_damping": kfgn.transforms.LevenbergMarquardt(2.0, thresholds=(0.75, 0.75))
    },
    "inverses each update": {"refresh_inverse_every": 1},
    "inverses each 20": {"refresh_inverse_every": 20},
    "exact damped inverse": {"inverse": "eigen"},
    "rate 1": {"learning_rate": 1.0},
    "rate 0.5": {"learning_rate": 0.5},
    "no momentum": {"momentum": False},
    "the paper's preset": kfgn.transforms.PRESETS["paper"],
}
METHODS = ("kfra", "kfac")
WIDTHS = (250, 500, 1000, 2000, 4000)
DEPTHS = (2, 4, 8, 16)
BATCHES = (125, 500, 2000, 8000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all, prints the tables and writes everything down."""
    parser = experiment.options("ablations", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", default="mnist", help="curves, mnist, faces, digits or fashion_mnist (mnist)")
    add("--updates", type=positive_int, default=100, help="of each training (100)")
    add("--layers", type=widths, default=(250, 125, 60, 20), help="(250,125,60,20)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--seeds", type=positive_int, default=2, help="trainings of each setting (2)")
    add("--batches", type=widths, default=BATCHES, help="batch sizes (125,500,2000,8000)")
    add("--widths", type=widths, default=WIDTHS, help="of one hidden layer (250,...,4000)")
    add("--depths", type=widths, default=DEPTHS, help="layers of width 100 (2,4,8,16)")
    options = parser.parse_args(arguments)
    given = _task(options, options.layers, max(*options.batches, options.batch_size))
    given = given._replace(batch_size=options.batch_size)
    console, settings, sizes = Console(), {}, {}
    shapes = _shapes(options)
    seeds = experiment.all_seeds(options)
    total = len(METHODS) * len(SETTINGS) + len(shapes)
    what = {"data": options.data, "updates": options.updates}
    with (
        experiment.ledger(options) as ledger,
        experiment.progress(console, "ablations", total) as ticker,
    ):
        for method, name in itertools.product(METHODS, SETTINGS):
            own = {"layers": options.layers, "batch_size": options.batch_size, "method": method,
                   "changed": SETTINGS[name], "seeds": list(seeds)}  # fmt: skip
            run = functools.partial(_ends, given, method, SETTINGS[name], options.updates, seeds)
            settings[f"{method}: {name}"] = ledger.measure({**what, **own}, run)
            ticker.step(f"{method}, {name}: {settings[f'{method}: {name}'][0][-1]:.1f}")
        for name, (layers, size) in shapes.items():
            own = {"layers": layers, "batch_size": size, "seed": options.seed}
            beside = functools.partial(_beside_adam, _task(options, layers, size), options)
            sizes[name] = ledger.measure({**what, **own}, beside)
            ticker.step(name)
        said, measured = experiment.settings(options), {"settings": settings, "sizes": sizes}
        tables = [_settings_table(settings, options.updates), _sizes_table(sizes)]
        experiment.record(options.out, "ablations", arguments, said, measured, tables, console)
    _plot(options.out / "ablations.png", settings)
    return 0


def _task(options: Any, layers: Sequence[int], size: int) -> task.Task:
    return task.autoencoder(options.data, options.data_dir, layers, size, 1e-5)


def _shapes(options: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Networks and batch sizes, by what is changed."""
    found = {f"batch {size}": (options.layers, size) for size in options.batches}
    found |= {f"width {w}": ((w, 30), options.batch_size) for w in options.widths}
    for depth in options.depths:  # of the whole autoencoder, the code in the middle
        found[f"depth {depth}"] = ((100,) * (depth // 2 - 1) + (30,), options.batch_size)
    return found


def _train(
    given: task.Task, method: str, changed: dict[str, Any], updates: int,
    seeds: Sequence[int], seconds: float = math.inf,
) -> list[list[race.Point]]:  # fmt: skip
    """A training for every seed, of parameters and batches."""
    if method == "adam":
        optimizer = first_order("adam", given.objective, changed["learning_rate"])
    else:
        start = given.start(seeds[0])
        optimizer = second_order(method, given.objective, start, given.example_batch, changed)
    every = max(1, updates // 2) if seconds == math.inf else 50
    return [
        race.run(optimizer, given.start(seed), given.batches(seed), given.evaluate, updates,
                 every, seed, seconds)[0]
        for seed in seeds
    ]  # fmt: skip


def _ends(
    given: task.Task, method: str, changed: dict[str, Any], updates: int, seeds: Sequence[int]
) -> list[list[float]]:
    """The losses half way and at the end, for every seed."""
    runs = _train(given, method, changed, updates, seeds)
    return [[points[1].loss, points[-1].loss] for points in runs]


def _beside_adam(given: task.Task, options: Any) -> dict[str, float]:
    """The losses of all methods, and Adam's best of two rates after as long as the first took."""
    seconds, found = 0.0, {}
    for method in METHODS:
        (points,) = _train(given, method, {}, options.updates, [options.seed])
        found[method] = points[-1].loss
        seconds = seconds or points[-1].seconds
    found["adam"] = min(
        _train(given, "adam", {"learning_rate": rate}, 10**6, [options.seed], seconds)[0][-1].loss
        for rate in (1e-3, 3e-3)
    )
    return found | {"seconds": seconds}


def _settings_table(settings: dict[str, Any], updates: int) -> Any:
    lines = []
    for name in SETTINGS:
        cells = []
        for method in METHODS:
            half, end = np.mean(settings[f"{method}: {name}"], axis=0)
            cells += [f"{half:.1f}", f"{end:.1f}"]
        lines.append([name, *cells])
    columns = ["changed", *(f"{m}, {n}" for m in METHODS for n in (updates // 2, updates))]
    return experiment.table("Training loss after so many updates, mean over seeds", columns, lines)


def _sizes_table(sizes: dict[str, dict[str, float]]) -> Any:
    lines = [
        [name, *(f"{f[kind]:.1f}" for kind in (*METHODS, "adam", "seconds"))]
        for name, f in sizes.items()
    ]
    columns = ["changed", *METHODS, "adam, same time", "seconds"]
    return experiment.table("Other batches and networks", columns, lines)


def _plot(path: Path, settings: dict[str, Any]) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(SETTINGS))
    for method, offset in zip(METHODS, (-0.15, 0.15), strict=False):
        for place, name in zip(places, SETTINGS, strict=True):
            ends = [end for _, end in settings[f"{method}: {name}"]]
            label = method if place == 0 else None
            axes.plot(ends, [place + offset] * len(ends), "o", color=COLOURS[method], label=label)
    axes.set_yticks(places, list(SETTINGS))
    axes.invert_yaxis()
    axes.set_xlabel("training loss at the end, every seed")
    axes.grid(True, alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=130)
