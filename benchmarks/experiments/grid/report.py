"""Tables and plots of `grid`: Adam by default, at its best and on average; the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.experiments.grid.settings import ADAM_DEFAULT, Setting
from benchmarks.harness.display import table
from benchmarks.harness.plots import COLORS, against, curve
from benchmarks.harness.race import Point

Runs = dict[Setting, dict[int, list[Point]]]  # by setting and seed
MEANS = (10, 20)  # of so many best settings of Adam
OTHERS = ("sgd", "momentum", "nesterov")


def end(points: Sequence[Point]) -> float:
    """The last loss; runs that diverged end early, with infinity."""
    return float(points[-1].loss)


def _first(runs: Runs, setting: Setting) -> list[Point]:
    """The run with the first seed: the whole grid has it."""
    return next(iter(runs[setting].values()))


def ranked(runs: Runs, method: str) -> list[Setting]:
    """A method's settings, the least last loss first."""
    own = [setting for setting in runs if setting.method == method]
    return sorted(own, key=lambda setting: end(_first(runs, setting)))


def best_of_adam(runs: Runs) -> list[Setting]:
    """Adam's settings of the grid, the best first; its default is not of the grid."""
    return [s for s in ranked(runs, "adam") if s.rate != ADAM_DEFAULT]


def losses_table(data: str, runs: Runs) -> Any:
    """The last losses of second order, of Adam in several readings, and of the others' best."""
    rows: list[list[Any]] = []

    def add(label: str, setting: Setting) -> None:
        seeds = list(runs[setting].values())
        last = seeds[0][-1]
        half = next(p for p in seeds[0] if p.update >= last.update / 2)
        others = ", ".join(f"{end(points):.3f}" for points in seeds[1:])
        each = 1e3 * last.seconds / max(last.update, 1)
        rows.append([label, last.update, f"{last.seconds:.1f}", f"{each:.1f}",
                     f"{half.loss:.3f}", f"{last.loss:.3f}", others or None])  # fmt: skip

    for setting in runs:
        if setting.rate is None:
            add(setting.label, setting)
    adam = best_of_adam(runs)
    for setting in runs:
        if setting.rate == ADAM_DEFAULT:
            add("adam, default", setting)
    add(f"best: {adam[0].label}", adam[0])
    for many in MEANS:
        if len(adam) >= many:
            ends = [end(_first(runs, setting)) for setting in adam[:many]]
            rows.append([f"adam, mean of the best {many} of {len(adam)}", None, None, None, None,
                         f"{np.mean(ends):.3f}", None])  # fmt: skip
    for method in dict.fromkeys(
        s.method for s in runs if s.rate is not None and s.method != "adam"
    ):
        add(f"best: {ranked(runs, method)[0].label}", ranked(runs, method)[0])
    columns = ["optimizer", "updates", "seconds", "ms/update", "half way", "end", "other seeds"]
    return table(f"{data}: training loss", columns, rows)


def reached(points: Sequence[Point], loss: float) -> Point | None:
    """The first measurement at which the loss was as low."""
    return next((p for p in points if p.loss <= loss), None)


def claims_table(data: str, runs: Runs) -> Any:
    """How many times more updates and seconds Adam takes to a loss that both reach."""
    rows = []
    for name, setting in (
        ("the best", best_of_adam(runs)[0]),
        ("the default", Setting("adam", ADAM_DEFAULT, 1.0)),
    ):
        for second in [s for s in runs if s.rate is None]:
            adam, ours = _first(runs, setting), _first(runs, second)
            goal = max(min(p.loss for p in adam), min(p.loss for p in ours))
            theirs, own = reached(adam, goal), reached(ours, goal)
            assert theirs is not None and own is not None
            more = theirs.update / max(own.update, 1), theirs.seconds / max(own.seconds, 1e-9)
            rows.append([f"{second.label}, Adam at {name}", f"{goal:.3f}", own.update,
                         theirs.update, f"{more[0]:.1f}", f"{more[1]:.2f}"])  # fmt: skip
    columns = [
        "to the loss that both reach",
        "loss",
        "updates",
        "Adam's",
        "ratio",
        "seconds' ratio",
    ]
    return table(f"{data}: Adam's updates and seconds over ours", columns, rows)


def _mean(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean run, point by point."""
    return [
        Point(points[0].update, *(float(np.mean([getattr(p, name) for p in points])) for name in
                                  ("seconds", "loss")))
        for points in zip(*runs, strict=True)
    ]  # fmt: skip


def plot(data: str, runs: Runs) -> Figure:
    """Losses against updates and seconds: second order, Adam's default, best and means."""
    adam = best_of_adam(runs)
    curves = []
    for setting in runs:
        if setting.rate is None:
            style = {"color": COLORS[setting.method], "linestyle": "-" if setting.average else ":"}
            curves.append(curve(setting.label, _first(runs, setting), **style))
    best, default = _first(runs, adam[0]), _first(runs, Setting("adam", ADAM_DEFAULT, 1.0))
    curves.append(curve(f"best: {adam[0].label}", best, color=COLORS["adam"]))
    curves.append(curve("adam, default", default, color="black"))
    for many, line in zip(MEANS, ("--", ":"), strict=True):
        kept = [_first(runs, s) for s in adam[:many] if np.isfinite(end(_first(runs, s)))]
        if len(kept) == many:
            style = {"color": COLORS["adam"], "linestyle": line}
            curves.append(curve(f"adam, mean of {many}", _mean(kept), **style))
    for method in OTHERS:
        if own := ranked(runs, method):
            style = {"color": COLORS[method]}
            curves.append(curve(own[0].label, _first(runs, own[0]), alpha=0.6, **style))
    title = f"Autoencoder on {data}: first order at its best, second order by default"
    figure, grid = against(curves, title=title)
    ends = [end(points) for seeds in runs.values() for points in seeds.values()]
    grid[0, 0].set_ylim(0.95 * min(ends), min(best[0].loss, 6 * min(ends)))
    return figure
