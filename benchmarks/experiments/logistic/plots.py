"""The figures of the logistic regression: losses by iteration, and decision boundaries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.experiments.logistic.solvers import Outcome, Points

COLORS = {
    "Newton, search": "tab:red",
    "Newton, unit": "tab:purple",
    "Newton, short": "tab:gray",
    "L-BFGS": "tab:blue",
    "NLCG": "tab:orange",
}
STYLES = {"Newton, unit": ":"}  # beside the searched steps, which are often the same
TITLES = {
    "full": "all points",
    "fixed": "fixed batches",
    "reshuffled": "reshuffled for every iteration",
    "each value": "reshuffled for every evaluation",
}


def plot_losses(outcomes: Sequence[Outcome], title: str) -> Figure:
    """The training loss against iterations, a panel for each sampling (figures 4 and 5)."""
    samplings = list(dict.fromkeys(o.sampling for o in outcomes))
    figure = Figure(figsize=(4 * len(samplings), 3.8), layout="constrained")
    panels = figure.subplots(1, len(samplings), sharey=True, squeeze=False)[0]
    for axes, sampling in zip(panels, samplings, strict=True):
        seen: set[str] = set()
        for outcome in (o for o in outcomes if o.sampling == sampling):
            label = None if outcome.solver in seen else outcome.solver
            seen.add(outcome.solver)
            count = np.arange(len(outcome.losses))
            color, style = COLORS[outcome.solver], STYLES.get(outcome.solver, "-")
            axes.plot(
                count, outcome.losses, style, color=color, linewidth=1.3, alpha=0.8, label=label
            )
            axes.plot(count[-1], outcome.losses[-1], "x", color=color)
        axes.set(title=TITLES[sampling], xlabel="iterations", xscale="symlog")
        axes.grid(True, alpha=0.25)
    highest = max(o.losses[0] for o in outcomes)
    least = min(float(np.min(o.losses)) for o in outcomes)
    panels[0].set(ylim=(least - 0.02, 1.1 * highest), ylabel="loss of all training points")
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    return figure


def plot_boundaries(outcomes: Sequence[Outcome], points: Points) -> Figure:
    """The test points with every solver's decision boundary (figure 3)."""
    samplings = list(dict.fromkeys(o.sampling for o in outcomes))
    figure = Figure(figsize=(4 * len(samplings), 4), layout="constrained")
    panels = figure.subplots(1, len(samplings), sharex=True, sharey=True, squeeze=False)[0]
    places, labels = points.test
    low, high = places.min(axis=0) - 0.3, places.max(axis=0) + 0.3
    x = np.linspace(low[0], high[0], 2)
    for axes, sampling in zip(panels, samplings, strict=True):
        for label, marker in ((0, "o"), (1, "^")):
            own = places[labels[:, 0] == label]
            axes.plot(*own.T, marker, color=str(0.4 + 0.3 * label), markersize=4)
        seen: set[str] = set()
        for outcome in (o for o in outcomes if o.sampling == sampling):
            (first, second), bias = np.ravel(outcome.params["w"]), float(outcome.params["b"][0])
            if second == 0:
                continue
            label_of = None if outcome.solver in seen else outcome.solver
            seen.add(outcome.solver)
            y = -(first * x + bias) / second
            axes.plot(x, y, color=COLORS[outcome.solver], linewidth=1, label=label_of)
        axes.set(title=TITLES[sampling], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    panels[0].legend(fontsize="small")
    return figure
