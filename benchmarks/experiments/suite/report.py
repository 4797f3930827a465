"""What the suite shows: who is ahead after as many seconds, and how soon."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.harness.display import figure, table
from benchmarks.harness.plots import COLORS, log_scale

SECOND_ORDER = ("kfra", "kfac", "kflr")
MOST = 20.0  # times the best time that a profile shows


class Trained(NamedTuple):
    """One training."""

    label: str  # the method and its setting
    compile_seconds: float
    points: list[tuple[int, float, float]]  # updates, seconds of them, training loss
    test_loss: float | None

    @property
    def end(self) -> float:
        """The last loss, infinite where it is not a number."""
        return self.points[-1][2] if np.isfinite(self.points[-1][2]) else np.inf

    def seconds_to(self, loss: float) -> float:
        """Until a loss as small was seen, infinite where none was."""
        return next((p[1] for p in self.points if p[2] <= loss), np.inf)


Found = Mapping[str, Mapping[str, Trained]]  # by task and method


def peer(own: Mapping[str, Trained]) -> Trained:
    """The best of the methods that are not kfgn's."""
    return min((t for k, t in own.items() if k not in SECOND_ORDER), key=lambda t: t.end)


def ratio(ours: Trained, best: Trained) -> float:
    """Our loss over the other's after as many seconds.

    Where one is not above zero, what the other has gained since the start over what we have.
    """
    if min(ours.end, best.end) > 0:
        return ours.end / best.end
    start = best.points[0][2]
    return (start - best.end) / max(start - ours.end, 1e-30)


def tables(found: Found) -> list[Table]:
    """Tasks with ratios of losses and of times; below them, on how many tasks kfgn is ahead."""
    columns = ("task", "best other", "loss", "test", "kfgn", "loss", "ratio", "time", "test")
    rows, ratios = list[list[Any]](), dict[str, list[float]]()
    for name, own in found.items():
        best = peer(own)
        for method in (m for m in SECOND_ORDER if m in own):
            ours = own[method]
            ratios.setdefault(method, []).append(ratio(ours, best))
            fraction = ours.seconds_to(best.end) / best.seconds_to(best.end)
            row = [name, best.label, f"{best.end:.3g}", figure(best.test_loss, ".3g"), method]
            row += [f"{ours.end:.3g}", f"{ratios[method][-1]:.2g}"]
            time = f"{fraction:.2f}" if fraction < np.inf else None
            rows.append([*row, time, figure(ours.test_loss, ".3g")])
    title = "Losses at equal seconds, and the part of its time to the best other's last loss"
    counts = [[m, f"{sum(r < 1 for r in own)} of {len(own)}", f"{max(own):.2g}"]
              for m, own in ratios.items()]  # fmt: skip
    return [
        table(title, columns, rows),
        table("kfgn's defaults", ("method", "ahead on", "never worse than"), counts),
    ]


# Of methods that other figures do not have.
_COLORS = {**COLORS, "adamw": "tab:brown", "muon": "tab:pink", "L-BFGS": "black"}


def figures(found: Found) -> dict[str, Figure]:
    """The performance profile, and the losses of every task against seconds."""
    return {"profile": _profile(found), "losses": _losses(found)}


def _profile(found: Found) -> Figure:
    """The fraction of a method's tasks that it solves within a factor of the best time."""
    factors: dict[str, list[float]] = {}
    for own in found.values():
        goal = peer(own).end
        times = {method: trained.seconds_to(goal) for method, trained in own.items()}
        for method, seconds in times.items():
            factors.setdefault(method, []).append(seconds / min(times.values()))
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    across = np.geomspace(1, MOST, 200)
    for method, slower in factors.items():
        within = [np.mean(np.asarray(slower) <= factor) for factor in across]
        axes.plot(across, within, label=method, color=_COLORS.get(method))
    axes.set(xscale="log", xlabel="times the best method's seconds", ylim=(-0.02, 1.02),
             ylabel="of its tasks at the best other's last loss")  # fmt: skip
    axes.legend(fontsize="small")
    return drawn


def _losses(found: Found) -> Figure:
    columns = min(len(found), 4)
    rows = -(-len(found) // columns)
    drawn = Figure(figsize=(3.5 * max(columns, 2), 3 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (name, own) in zip(grid.flat, found.items(), strict=False):
        for method, trained in own.items():
            _, seconds, losses = zip(*trained.points, strict=True)
            axes.plot(seconds, losses, label=method, color=_COLORS.get(method), linewidth=1)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("seconds of updates", fontsize="x-small")
        if all(p[2] > 0 for trained in own.values() for p in trained.points):
            log_scale(axes)
    grid[0, 0].legend(fontsize="x-small")
    return drawn
