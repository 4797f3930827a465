"""The figures of `fashion`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.experiments.fashion.hessian_free import DAMPINGS, PRECONDITIONERS, method_name
from benchmarks.experiments.fashion.training import Run
from benchmarks.harness.plots import against, curve, log_scale

COLORS = {
    "GD, 0.1": "silver",
    "GD, 1": "tab:gray",
    "gradient descent": "tab:gray",
    "NLCG": "tab:brown",
    "L-BFGS-B": "black",
    "KFRA": "tab:red",
    "KFLR": "tab:purple",
    "KFAC": "tab:blue",
    "HF, none": "gold",
    "HF, diagonal": "tab:olive",
    "HF, Kronecker": "tab:green",
    "Adam": "tab:orange",
}


def all_figures(found: Any) -> dict[str, Figure]:
    """Those for which there are measurements."""
    figures = {f"{k}_hidden": _curves(k, runs) for k, runs in found.networks.items() if runs}
    if found.networks:
        figures["gaps"] = _gaps(found.networks)
    if found.conditioned:
        figures["cg_iterations"] = _cg_iterations(found)
    if found.depths:
        figures["depth"] = _depth(found.depths)
    return figures


def _curves(hidden: int, runs: Sequence[Run]) -> Figure:
    """Objective and dev accuracy, against iterations and seconds."""
    curves = [curve(run.method, run.points, color=COLORS.get(run.method)) for run in runs]
    up = {"objective": "objective on the training images"}
    up |= {"dev_accuracy": "accuracy on the dev images"}
    across = {"iteration": "iterations or updates", "seconds": "seconds of training"}
    title = f"Fashion-MNIST, {hidden} hidden layer{'s' if hidden > 1 else ''}"
    figure, grid = against(curves, up, across, title)
    grid[1, 0].set_xscale("symlog", linthresh=10)
    grid[1, 0].set_xlim(left=0)
    return figure


def _gaps(networks: dict[int, list[Run]]) -> Figure:
    figure = Figure(figsize=(6 * len(networks), 4.2), layout="constrained")
    grid = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, (hidden, runs) in zip(grid, networks.items(), strict=True):
        for run in runs:
            gaps = [100 * point.gap for point in run.points]
            axes.plot(run.column("seconds"), gaps, color=COLORS.get(run.method), label=run.method)
        axes.set_title(f"{hidden} hidden")
        axes.set_xlabel("seconds of training")
        axes.grid(True, alpha=0.25)
    grid[0].set_ylabel("train less dev accuracy, points")
    if grid[-1].lines:
        grid[-1].legend(fontsize="small")
    return figure


def _cg_iterations(found: Any) -> Figure:
    """Left: of every update of each network's runs. Right: at one place, against the damping."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    along, at_one_place = figure.subplots(1, 2)
    for hidden, style in zip(found.networks, ("-", "--", ":", "-."), strict=False):
        for run in found.networks[hidden]:
            if run.cg_iterations:
                label = f"{run.method}, {hidden} hidden"
                color = COLORS.get(run.method)
                along.plot(run.cg_iterations, style, color=color, label=label, lw=1)
    place, counts = next(reversed(found.conditioned.items()))
    for name in PRECONDITIONERS:
        color = COLORS.get(method_name(name))
        at_one_place.plot(DAMPINGS, counts[name], "o-", color=color, label=name)
    at_one_place.set_xscale("log")
    at_one_place.set_xlabel("damping λ")
    at_one_place.set_title(place)
    along.set_xlabel("update")
    along.set_ylabel("CG iterations")
    for axes in (along, at_one_place):
        axes.grid(True, which="both", alpha=0.25)
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _depth(depths: Sequence[Any]) -> Figure:
    """Gradients layer by layer at the start; accuracy after all updates; the way there."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    layers, accuracy, way = figure.subplots(1, 3)
    for depth in depths:
        layers.plot(range(1, depth.hidden + 2), depth.gradients, "o-", label=f"{depth.hidden}")
    layers.set_yscale("log")
    layers.set_xlabel("layer")
    layers.set_ylabel("gradient's norm over the last layer's, at the start")
    layers.legend(title="hidden layers")
    hidden = [depth.hidden for depth in depths]
    for number, run in enumerate(depths[0].runs):
        ends = [depth.runs[number].last.dev_accuracy for depth in depths]
        accuracy.plot(hidden, ends, "o-", color=COLORS.get(run.method), label=run.method)
    accuracy.set_xlabel("hidden layers")
    accuracy.set_ylabel("accuracy on the test digits")
    accuracy.legend()
    for run in depths[-1].runs:
        way.plot(run.column("iteration"), run.column("objective"), color=COLORS.get(run.method))
    log_scale(way)
    way.set_xlabel("updates")
    way.set_ylabel(f"training loss, {depths[-1].hidden} hidden")
    for axes in (layers, accuracy, way):
        axes.grid(True, which="both", alpha=0.25)
    return figure
