"""``python -m benchmarks figure``: the README's figure, from the committed results of ``peers``.

Loss against seconds of KFRA, KFAC, kfac-jax from the better of its dampings, and Adam at the best
of its rates; a line for each seed. Nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.harness.arguments import RESULTS, options
from benchmarks.harness.plots import COLORS

PICTURE = Path("docs/pages/images")
SHOWN = {"kfac": "KFAC", "kfra": "KFRA", "kfac-jax": "kfac-jax", "adam": "Adam, rate"}
TICKS = (60, 80, 100, 150, 200, 300, 500)


def main(arguments: Sequence[str]) -> None:
    """Draws it."""
    parser = options("figure", __doc__, seeded=False, data=False, out=PICTURE)
    parser.add_argument("--results", type=Path, default=RESULTS / "peers" / "results.json")
    given = parser.parse_args(arguments)
    runs = json.loads(given.results.read_text())["measured"]
    given.out.mkdir(parents=True, exist_ok=True)
    draw(runs).savefig(given.out / "loss.png", dpi=110)
    print(f"loss.png is in {given.out}")


def draw(runs: dict[str, list[list[list[float]]]]) -> Figure:
    """Of every kind the runs that have most seeds, which are those at its best setting."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, label in SHOWN.items():
        own = [name for name in runs if name.partition(",")[0].partition(" ")[0] == kind]
        best = max(own, key=lambda name: len(runs[name]))
        for seed, points in enumerate(runs[best]):
            _, seconds, losses = zip(*points, strict=True)
            said = (label + best.removeprefix(kind)) if seed == 0 else None
            color = COLORS.get(kind, "tab:green")
            axes.plot(seconds, losses, color=color, label=said, linewidth=1.2)
    axes.set_xlabel("seconds of updates, two CPU cores")
    axes.set_ylabel("training loss")
    axes.set_title("784-1000-500-250-30-... on MNIST, three seeds", fontsize="medium")
    axes.set_yscale("log")
    axes.set_yticks(TICKS, map(str, TICKS))
    axes.minorticks_off()
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize="small")
    return figure
