"""Tables and plots of `grid`: Adam by default, at its best and on average; the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.experiments.grid.settings import ADAM_DEFAULT, Setting
from benchmarks.harness import experiment
from benchmarks.harness.plots import COLOURS
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
    return experiment.table(f"{data}: training loss", columns, rows)


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
    return experiment.table(f"{data}: Adam's updates and seconds over ours", columns, rows)


def _mean(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean run, point by point."""
    return [
        Point(points[0].update, *(float(np.mean([getattr(p, name) for p in points])) for name in
                                  ("seconds", "loss")))
        for points in zip(*runs, strict=True)
    ]  # fmt: skip


def plot(path: Path, data: str, runs: Runs) -> None:
    """Losses against updates and seconds: second order, Adam's default, best and means."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_update, by_time = figure.subplots(1, 2, sharey=True)
    adam = best_of_adam(runs)
    for axes, field in ((by_update, "update"), (by_time, "seconds")):

        def draw(
            points: Sequence[Point], axes: Any = axes, field: str = field, **style: Any
        ) -> None:
            axes.plot([getattr(p, field) for p in points], [p.loss for p in points], **style)

        for setting in runs:
            if setting.rate is None:
                line = "-" if setting.average else ":"
                draw(_first(runs, setting), color=COLOURS[setting.method], linestyle=line,
                     label=setting.label)  # fmt: skip
        draw(_first(runs, adam[0]), color=COLOURS["adam"], label=f"best: {adam[0].label}")
        draw(_first(runs, Setting("adam", ADAM_DEFAULT, 1.0)), color="black", label="adam, default")
        for many, line in zip(MEANS, ("--", ":"), strict=True):
            kept = [_first(runs, s) for s in adam[:many] if np.isfinite(end(_first(runs, s)))]
            if len(kept) == many:
                draw(
                    _mean(kept),
                    color=COLOURS["adam"],
                    linestyle=line,
                    label=f"adam, mean of {many}",
                )
        for method in OTHERS:
            if own := ranked(runs, method):
                draw(_first(runs, own[0]), color=COLOURS[method], alpha=0.6, label=own[0].label)
    ends = [end(points) for seeds in runs.values() for points in seeds.values()]
    start = _first(runs, adam[0])[0].loss
    by_update.set_ylim(0.95 * min(ends), min(start, 6 * min(ends)))
    by_update.set_ylabel("training loss per example")
    for axes, label in ((by_update, "updates"), (by_time, "seconds of training")):
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(True, which="both", alpha=0.25)
    by_time.legend(fontsize=7)
    figure.suptitle(f"Autoencoder on {data}: first order at its best, second order by default")
    figure.savefig(path, dpi=130)
