"""What the experiments' figures share: colors, and curves against updates and seconds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window system, no global state
from matplotlib.ticker import LogFormatter

COLORS = {
    "kfra": "tab:red",
    "kflr": "tab:purple",
    "kfac": "tab:blue",
    "adam": "tab:orange",
    "sgd": "tab:gray",
    "momentum": "tab:green",
    "nesterov": "tab:olive",
}
LOSS = {"loss": "training loss per example"}
ACROSS = {"update": "updates", "seconds": "seconds of training"}


class Curve(NamedTuple):
    """One line of `against`: columns of numbers by name, and how it is drawn."""

    label: str | None
    columns: Mapping[str, Sequence[Any]]
    style: Mapping[str, Any] = {}


def curve(label: str | None, points: Sequence[Any], **style: Any) -> Curve:
    """Of named tuples, such as `race.Point`."""
    fields = points[0]._fields
    return Curve(label, {name: [getattr(p, name) for p in points] for name in fields}, style)


def against(
    curves: Sequence[Curve],
    up: Mapping[str, str] = LOSS,
    across: Mapping[str, str] = ACROSS,
    title: str = "",
) -> tuple[Figure, np.ndarray]:
    """Lines in a grid of axes, `[up, across]`; the first row has a logarithmic scale.

    Args:
      curves: those without a column are left out of its axes.
      up: labels of the rows, by the columns they show.
      across: labels of the columns, likewise.
      title: of the figure.
    """
    figure = Figure(figsize=(11, 4.2 * len(up)), layout="constrained")
    grid = figure.subplots(len(up), len(across), sharex="col", sharey="row", squeeze=False)
    for line, (name, said) in zip(grid, up.items(), strict=True):
        line[0].set_ylabel(said)
        for axes, over in zip(line, across, strict=True):
            for label, columns, style in curves:
                if over in columns and name in columns:
                    axes.plot(columns[over], columns[name], label=label, **style)
            axes.grid(True, which="both", alpha=0.25)
    for axes, said in zip(grid[-1], across.values(), strict=True):
        axes.set_xlabel(said)
    for axes in grid[0]:
        log_scale(axes)
    if any(line.get_label()[:1] != "_" for line in grid[0, -1].lines):
        grid[0, -1].legend(fontsize="small")
    figure.suptitle(title)
    return figure, grid


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, if anything above zero is shown."""
    if any(value > 0 for line in axes.lines for value in np.asarray(line.get_ydata())):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def dots(
    rows: Mapping[str, Sequence[tuple[Sequence[float], str, str | None]]], label: str
) -> tuple[Figure, Axes]:
    """A row of dots for every name: `(values, color, label)` for each group, one below another."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for place, groups in enumerate(rows.values()):
        for k, (values, color, said) in enumerate(groups):
            offset = 0.3 * (k - (len(groups) - 1) / 2)
            axes.plot(values, [place + offset] * len(values), "o", color=color, label=said)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(True, alpha=0.25)
    return figure, axes
