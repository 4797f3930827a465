"""The figures of negative curvature during training: by layer, and of whole networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROWS = {
    "least": "least eigenvalue\nof the block",
    "negative_share": "negative eigenvalues\nof the block, share",
    "term_negative_share": "terms of eq. (87)\nbelow zero, share",
    "term_trace": "their sum,\nmean of examples",
    "term_norm": "their norm,\nroot mean square",
}
SHARES = ("negative_share", "term_negative_share")
LINEAR_BELOW = 1e-6  # of the axes with both signs


def plot_layers(found: Mapping[str, Sequence[Any]]) -> Figure:
    """A column for each network, a row for each measure, a line for each layer."""
    size = (3.0 * len(found) + 1, 2.0 * len(ROWS))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(ROWS), len(found), sharex=True, sharey="row", squeeze=False)
    for axes, name in zip(grid[0], found, strict=True):
        axes.set_title(name)
    for axes in grid[-1]:
        axes.set_xlabel("updates")
    for row, (field, label) in zip(grid, ROWS.items(), strict=True):
        for axes, looks in zip(row, found.values(), strict=True):
            updates = [look.update for look in looks]
            for layer in looks[0].layers:
                values = [look.layers[layer][field] for look in looks]
                axes.plot(updates, values, marker=".", label=layer)
            axes.set_xscale("symlog")
            if field in SHARES:
                axes.set_ylim(-0.05, 1.05)
            else:
                axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
                axes.axhline(0, color="0.6", linewidth=0.8)
            axes.grid(True, alpha=0.25)
        row[0].set_ylabel(label)
    grid[0][0].legend(fontsize="small")
    return figure


def plot_network(found: Mapping[str, Sequence[Any]]) -> Figure:
    """The loss, and the least eigenvalue of the whole Hessian beside the blocks' least."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, whole, blocks = figure.subplots(1, 3)
    for name, looks in found.items():
        updates = [look.update for look in looks]
        losses.plot(updates, [look.loss for look in looks], marker=".", label=name)
        whole.plot(updates, [look.least for look in looks], marker=".", label=name)
        lowest = [
            min(layer["least"] / layer["greatest"] for layer in look.layers.values())
            for look in looks
        ]
        blocks.plot(updates, np.asarray(lowest), marker=".", label=name)
    losses.set(yscale="log", title="loss")
    whole.set_yscale("symlog", linthresh=1e-3)
    whole.set_title("least eigenvalue of the whole Hessian")
    blocks.set_yscale("symlog", linthresh=1e-12)
    blocks.set_title("least eigenvalue of any block / greatest")
    for axes in (losses, whole, blocks):
        axes.set(xlabel="updates", xscale="symlog", xlim=(-0.2, None))
        axes.grid(True, alpha=0.25)
    losses.legend(fontsize="small")
    return figure
