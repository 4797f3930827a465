"""The figures of a run: loss curves, beside published ones, and reconstructions."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window system, no global state
from matplotlib.ticker import LogFormatter

from benchmarks.harness.runs import Result

REFERENCES = Path(__file__).parents[1] / "results" / "references"
COLOURS = {
    "kfra": "tab:red",
    "kflr": "tab:purple",
    "kfac": "tab:blue",
    "adam": "tab:orange",
    "sgd": "tab:gray",
    "momentum": "tab:green",
    "nesterov": "tab:olive",
}


@dataclass(frozen=True)
class Reference:
    """A published loss curve to compare with; ``sgd_steps`` is its cost where that is known."""

    label: str
    updates: list[float]
    losses: list[float]
    sgd_steps: list[float] | None


def references(data: str, folder: Path = REFERENCES) -> tuple[list[Reference], list[str]]:
    """The curves a folder has for this data set, and a line about each file that is unreadable.

    Files are called ``<data>_<label>.csv`` and have the columns update, train_loss (or
    loss_first_10k: the training loss is that of the first 10,000 images) and perhaps
    sgd_step_equivalents.
    """
    curves, problems = [], []
    for path in sorted(folder.glob(f"{data}_*.csv")):
        try:
            with path.open(newline="") as file:
                lines = list(csv.DictReader(file))
            costs = [line.get("sgd_step_equivalents") or "" for line in lines]
            curves.append(
                Reference(
                    path.stem.removeprefix(f"{data}_").replace("_", " "),
                    [float(line["update"]) for line in lines],
                    [float(line.get("train_loss") or line["loss_first_10k"]) for line in lines],
                    [float(cost) for cost in costs] if lines and all(costs) else None,
                )
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"reference {path} left out: {type(error).__name__}: {error}")
    return curves, problems


def plot_losses(
    path: Path,
    results: Sequence[Result],
    title: str,
    where: str,
    curves: Sequence[Reference] = (),
    sgd_seconds: float | None = None,
) -> None:
    """Training loss against updates and against seconds (on ``where``), side by side."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_update, by_time = figure.subplots(1, 2, sharey=True)
    for result in results:
        color = COLOURS.get(result.name)
        by_update.plot(*result.curve("update", "train_loss"), color=color, label=result.name)
        by_time.plot(*result.curve("seconds", "train_loss"), color=color, label=result.name)
    for number, curve in enumerate(curves):
        style = {"color": str(0.25 + 0.5 * number / len(curves)), "linestyle": "--"}
        by_update.plot(curve.updates, curve.losses, label=curve.label, **style)
        if curve.sgd_steps and sgd_seconds:
            seconds = [steps * sgd_seconds for steps in curve.sgd_steps]
            by_time.plot(seconds, curve.losses, label=curve.label, **style)
    _finish(by_update, "updates")
    _finish(by_time, f"seconds of training ({where})")
    by_update.set_ylabel("training loss per example")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _finish(axes: Axes, label: str) -> None:
    # A log axis needs something above zero to show.
    if any(value > 0 for line in axes.lines for value in np.asarray(line.get_ydata())):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel(label)
    axes.grid(True, which="both", alpha=0.25)
    if axes.lines:
        axes.legend()


def plot_reconstructions(
    path: Path,
    originals: np.ndarray,
    reconstructions: Mapping[str, np.ndarray],
    image_shape: Sequence[int],
) -> None:
    """A row of original images, and below it a row of each optimizer's reconstructions."""
    rows = {"original": originals, **reconstructions}
    count = len(originals)
    size = (0.8 * count + 1.2, 0.8 * len(rows) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    low, high = float(originals.min()), float(originals.max())
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.reshape(image_shape), cmap="gray", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=130)
