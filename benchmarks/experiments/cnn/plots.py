"""The plots of `cnn`: f and accuracy against iterations and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no window system, no global state

from benchmarks import BenchmarkError

COLOURS = {
    "kfra": "tab:red",
    "kflr": "tab:purple",
    "adam": "tab:orange",
    "momentum": "tab:green",
}
NEWTONS = ("#08306b", "#2171b5", "#6baed6", "#9ecae1")


def plot_part(path: Path, title: str, runs: Sequence[dict[str, Any]]) -> None:
    """One data set under one loss: two rows of axes, two columns of abscissae."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    newtons = iter(NEWTONS * len(runs))
    for run in runs:
        kind = run["method"].split()[0]
        color = COLOURS[kind] if kind in COLOURS else next(newtons)
        style = {"color": color, "marker": "o", "markersize": 3, "label": run["method"]}
        for line, figure_name in zip(axes, ("objective", "accuracy"), strict=True):
            shown = [row for row in run["curve"] if row[figure_name] is not None]
            for place, abscissa in zip(line, ("iteration", "seconds"), strict=True):
                place.plot([r[abscissa] for r in shown], [r[figure_name] for r in shown], **style)
    for place in axes.flat:
        place.grid(True, which="both", alpha=0.25)
    axes[0, 0].set_yscale("log")
    most = max(row["iteration"] for run in runs for row in run["curve"])
    axes[0, 0].set_xscale("symlog", linthresh=1)  # the start is iteration 0
    axes[0, 0].set_xlim(-0.1, 1.5 * most)
    axes[0, 0].set_ylabel("training objective f")
    axes[1, 0].set_ylabel("test accuracy")
    axes[1, 0].set_xlabel("iterations")
    axes[1, 1].set_xlabel("seconds of training")
    axes[0, 1].legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise BenchmarkError(f"cannot write {path}: {error}") from error
