"""The plots of `cnn`: f and accuracy against iterations and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.plots import COLORS, Curve, against

NEWTONS = ("#08306b", "#2171b5", "#6baed6", "#9ecae1")
UP = {"objective": "training objective f", "accuracy": "test accuracy"}
ACROSS = {"iteration": "iterations", "seconds": "seconds of training"}


def plot_part(title: str, runs: Sequence[dict[str, Any]]) -> Figure:
    """One data set under one loss: two rows of axes, two columns of abscissae."""
    newtons, curves = iter(NEWTONS * len(runs)), []
    for run in runs:
        color = COLORS.get(run["method"].split()[0]) or next(newtons)
        columns = {name: [row[name] for row in run["curve"]] for name in (*UP, *ACROSS)}
        style = {"color": color, "marker": "o", "markersize": 3}
        curves.append(Curve(run["method"], columns, style))
    figure, grid = against(curves, UP, ACROSS, title)
    most = max(row["iteration"] for run in runs for row in run["curve"])
    grid[0, 0].set_xscale("symlog", linthresh=1)  # the start is iteration 0
    grid[0, 0].set_xlim(-0.1, 1.5 * most)
    return figure
