"""The table and the plots of the autoencoder's runs, beside published curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.autoencoder.training import Result
from benchmarks.harness.arguments import RESULTS
from benchmarks.harness.display import figure, table, write_tables
from benchmarks.harness.plots import COLORS, Curve, against
from benchmarks.harness.record import cores, save_figure
from benchmarks.harness.runs import RunFolder
from benchmarks.harness.tasks import Task

REFERENCES = Path(__file__).parents[2] / RESULTS.name / "references"
SHOWN = 10  # images in the plot of reconstructions
UP = {"train_loss": "training loss per example"}


def write(
    folder: RunFolder,
    results: Sequence[Result],
    task: Task,
    more: Path | None,
    sgd_seconds: float | None,
    console: Console,
) -> None:
    """Shows the table, and keeps it and the plots of whatever was measured."""
    shown, data = _table(results, sgd_seconds), task.dataset.name
    console.print(shown)
    folder.write("table.txt", lambda path: write_tables(path, [shown]))
    curves, problems = references(data)
    if more is not None:
        others, unreadable = references(data, more)
        if not others and not unreadable:
            problems.append(f"no {data}_*.csv in {more}")
        curves, problems = curves + others, problems + unreadable
    for problem in problems:
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    title = f"Autoencoder on {data}, {task.batch_size} images per update"
    folder.write("losses.png", lambda path: plot_losses(path, results, title, curves, sgd_seconds))
    folder.write("reconstructions.png", lambda path: plot_reconstructions(path, results, task))


def _table(results: Sequence[Result], sgd_seconds: float | None) -> Table:
    """Cost and outcome of every optimizer; `sgd_seconds` is the time of one SGD step."""
    rows = []
    for result in results:
        latest = result.rows[-1]
        updates, seconds = latest["update"] or 0, latest["seconds"] or 0.0
        each = seconds / updates if updates else None
        name = result.name if result.outcome == "finished" else f"{result.name} ({result.outcome})"
        rows.append([
            name, f"{updates:.0f}", f"{seconds:.1f}", figure(each, ".4f"),
            figure(each / sgd_seconds if each and sgd_seconds else None, ".1f"),
            figure(latest.get("train_loss"), ".3f"), figure(latest.get("test_loss"), ".3f"),
        ])  # fmt: skip
    columns = ["optimizer", "updates", "seconds", "s/update", "SGD steps", "train", "test"]
    return table("", columns, rows)


def references(data: str, folder: Path = REFERENCES) -> tuple[list[Curve], list[str]]:
    """The curves a folder has for this data set, and a line about each file that is unreadable.

    Files are called ``<data>_<label>.csv`` and have the columns update, train_loss (or
    loss_first_10k: the training loss is that of the first 10,000 images) and perhaps
    sgd_step_equivalents, the cost.
    """
    curves, problems = [], []
    for path in sorted(folder.glob(f"{data}_*.csv")):
        try:
            with path.open(newline="") as file:
                lines = list(csv.DictReader(file))
            costs = [line.get("sgd_step_equivalents") or "" for line in lines]
            columns = {
                "update": [float(line["update"]) for line in lines],
                "train_loss": [float(line.get("train_loss") or line["loss_first_10k"])
                               for line in lines],
            }  # fmt: skip
            if lines and all(costs):
                columns["sgd_steps"] = [float(cost) for cost in costs]
            curves.append(Curve(path.stem.removeprefix(f"{data}_").replace("_", " "), columns))
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems.append(f"reference {path} left out: {type(error).__name__}: {error}")
    return curves, problems


def plot_losses(
    path: Path,
    results: Sequence[Result],
    title: str,
    others: Sequence[Curve] = (),
    sgd_seconds: float | None = None,
) -> None:
    """Training loss against updates and against seconds, side by side."""
    names = ("update", "seconds", "train_loss")
    curves = [
        Curve(r.name, {name: [row[name] for row in r.rows] for name in names},
              {"color": COLORS.get(r.name)})
        for r in results
    ]  # fmt: skip
    for number, (label, columns, _) in enumerate(others):
        style = {"color": str(0.25 + 0.5 * number / len(others)), "linestyle": "--"}
        if "sgd_steps" in columns and sgd_seconds:
            columns = {**columns, "seconds": [n * sgd_seconds for n in columns["sgd_steps"]]}
        curves.append(Curve(label, columns, style))
    where = f"seconds of training ({jax.devices()[0].device_kind}, {cores()} cores)"
    figure, grid = against(curves, UP, {"update": "updates", "seconds": where}, title)
    if curves:
        grid[0, 0].legend(fontsize="small")
    save_figure(path, figure)


def plot_reconstructions(path: Path, results: Sequence[Result], task: Task) -> None:
    """A row of original test images, and below it a row of each optimizer's reconstructions."""
    # Spread over the set: neighbors can be the same face, turned a little.
    test = task.dataset.test
    originals = test[np.linspace(0, len(test) - 1, min(SHOWN, len(test))).astype(int)]
    rows: dict[str, Any] = {"original": originals}
    for result in results:
        if result.params is not None:
            outputs: Any = task.model.apply(result.params, originals)
            logits = task.dataset.loss == "sigmoid_binary_cross_entropy"
            rows[result.name] = np.asarray(jax.nn.sigmoid(outputs) if logits else outputs)
    save_figure(path, _images(rows, task.dataset.image_shape))


def _images(rows: Mapping[str, np.ndarray], shape: Sequence[int]) -> Figure:
    originals = next(iter(rows.values()))
    count = len(originals)
    figure = Figure(figsize=(0.8 * count + 1.2, 0.8 * len(rows) + 0.2), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    low, high = float(originals.min()), float(originals.max())
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.reshape(shape), cmap="gray", vmin=low, vmax=high)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure
