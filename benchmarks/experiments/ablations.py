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
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import kfgn
from benchmarks.harness import race, tasks
from benchmarks.harness.arguments import all_seeds, options, positive_int, widths
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.optimizers import first_order, second_order
from benchmarks.harness.plots import COLORS, dots

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
    "factors each update, decay 0.85": {"refresh_factors_every": 1, "decay": 0.85},
    "periods by cost": {"refresh_factors_every": "auto", "refresh_inverse_every": "auto"},
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


def main(arguments: Sequence[str]) -> None:
    """Trains all, prints the tables and writes everything down."""
    parser = options("ablations", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", default="mnist", help="curves, mnist, faces, digits or fashion_mnist (mnist)")
    add("--updates", type=positive_int, default=100, help="of each training (100)")
    add("--layers", type=widths, default=(250, 125, 60, 20), help="(250,125,60,20)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--seeds", type=positive_int, default=2, help="trainings of each setting (2)")
    add("--batches", type=widths, default=BATCHES, help="batch sizes (125,500,2000,8000)")
    add("--widths", type=widths, default=WIDTHS, help="of one hidden layer (250,...,4000)")
    add("--depths", type=widths, default=DEPTHS, help="layers of width 100 (2,4,8,16)")
    given = parser.parse_args(arguments)
    _task(given, given.layers, max(given.batches))  # are there so many images?
    task = _task(given, given.layers, given.batch_size)
    shapes, settings, sizes = _shapes(given), {}, {}
    what = {"data": given.data, "updates": given.updates}
    total = len(METHODS) * len(SETTINGS) + len(shapes)
    with experiment("ablations", arguments, given, total) as run:
        for method, name in itertools.product(METHODS, SETTINGS):
            own = {"layers": given.layers, "batch_size": given.batch_size, "method": method,
                   "changed": SETTINGS[name], "seeds": list(all_seeds(given))}  # fmt: skip
            ends = functools.partial(_ends, task, method, SETTINGS[name], given)
            found = settings[f"{method}: {name}"] = run.measure({**what, **own}, ends)
            run.tick(f"{method}, {name}: {found[0][-1]:.1f}")
        for name, (layers, size) in shapes.items():
            own = {"layers": layers, "batch_size": size, "seed": given.seed}
            beside = functools.partial(_beside_adam, _task(given, layers, size), given)
            sizes[name] = run.measure({**what, **own}, beside)
            run.tick(name)
        tables = [_settings_table(settings, given.updates), _sizes_table(sizes)]
        measured = {"settings": settings, "sizes": sizes}
        run.record(measured, tables, {"ablations": _plot(settings)})


def _task(given: Any, layers: Sequence[int], size: int) -> tasks.Task:
    return tasks.autoencoder(given.data, given.data_dir, layers, size, 1e-5)


def _shapes(given: Any) -> dict[str, tuple[tuple[int, ...], int]]:
    """Networks and batch sizes, by what is changed."""
    found = {f"batch {size}": (given.layers, size) for size in given.batches}
    found |= {f"width {w}": ((w, 30), given.batch_size) for w in given.widths}
    for depth in given.depths:  # of the whole autoencoder, the code in the middle
        found[f"depth {depth}"] = ((100,) * (depth // 2 - 1) + (30,), given.batch_size)
    return found


def _train(
    task: tasks.Task, method: str, changed: dict[str, Any], updates: int,
    seeds: Sequence[int], seconds: float = math.inf,
) -> list[list[race.Point]]:  # fmt: skip
    """A training for every seed, of parameters and batches."""
    if method == "adam":
        optimizer = first_order("adam", task.objective, changed["learning_rate"])
    else:
        start = task.start(seeds[0])
        optimizer = second_order(method, task.objective, start, task.example_batch, changed)
    every = max(1, updates // 2) if seconds == math.inf else 50
    return [race.points_of(optimizer, task, updates, every, seed, seconds) for seed in seeds]


def _ends(task: tasks.Task, method: str, changed: dict[str, Any], given: Any) -> list[list[float]]:
    """The losses half way and at the end, for every seed."""
    runs = _train(task, method, changed, given.updates, all_seeds(given))
    return [[points[1].loss, points[-1].loss] for points in runs]


def _beside_adam(task: tasks.Task, given: Any) -> dict[str, float]:
    """The losses of all methods, and Adam's best of two rates after as long as the first took."""
    seconds, found = 0.0, {}
    for method in METHODS:
        (points,) = _train(task, method, {}, given.updates, [given.seed])
        found[method] = points[-1].loss
        seconds = seconds or points[-1].seconds
    found["adam"] = min(
        _train(task, "adam", {"learning_rate": rate}, 10**6, [given.seed], seconds)[0][-1].loss
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
    return table("Training loss after so many updates, mean over seeds", columns, lines)


def _sizes_table(sizes: dict[str, dict[str, float]]) -> Any:
    lines = [
        [name, *(f"{f[kind]:.1f}" for kind in (*METHODS, "adam", "seconds"))]
        for name, f in sizes.items()
    ]
    columns = ["changed", *METHODS, "adam, same time", "seconds"]
    return table("Other batches and networks", columns, lines)


def _plot(settings: dict[str, Any]) -> Figure:
    rows = {
        name: [([end for _, end in settings[f"{m}: {name}"]], COLORS[m], None) for m in METHODS]
        for name in SETTINGS
    }
    figure, axes = dots(rows, "training loss at the end, every seed")
    for method in METHODS:
        axes.plot([], [], "o", color=COLORS[method], label=method)
    axes.legend()
    return figure
