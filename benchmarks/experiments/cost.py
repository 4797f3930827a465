"""``python -m benchmarks cost``: what the factors cost as batch, width, outputs and samples grow.

Botev et al., appendix D.4, count for the pre-activation factors of a layer: KFRA two products of
`[D, D]` matrices, whatever the batch; KFAC with S samples, and KFLR with K outputs, a backward pass
of N S or N K rows and its second moment. Measured is a whole call that returns value, gradient and
factors, less one that returns value and gradient, in units of the latter; exponents are fitted to
that difference over the upper half of each sweep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import options, positive_int
from benchmarks.harness.display import figure, table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.optimizers import with_key
from benchmarks.harness.plots import COLORS
from benchmarks.harness.timing import timed

LAYERS = 4
BASE = {"N": 1000, "D": 256, "K": 10, "S": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "N": (125, 250, 500, 1000, 2000, 4000),
    "D": (64, 128, 256, 512, 1024),
    "K": (5, 10, 20, 40, 80, 160),
    "S": (1, 2, 4, 8, 16, 32),
}
METHODS = ("kfra", "kflr", "kfac")
# The exponent that the counts of appendix D.4 have for large values; products with N dominate
# in Q (N D^2, for all three), so KFRA's whole cost still grows with N.
EXPECTED = {
    ("kfra", "N"): "0 for G, 1 for Q", ("kfra", "D"): "3 for G, 2 for Q", ("kfra", "K"): "0",
    ("kfra", "S"): "0", ("kflr", "N"): "1", ("kflr", "D"): "2", ("kflr", "K"): "1",
    ("kflr", "S"): "0", ("kfac", "N"): "1", ("kfac", "D"): "2", ("kfac", "K"): "0",
    ("kfac", "S"): "1",
}  # fmt: skip


class Row(NamedTuple):
    """One measured call."""

    swept: str
    value: int
    method: str
    gradient_seconds: float
    seconds: float  # with the factors

    @property
    def excess(self) -> float:
        """What the factors add, in units of value and gradient."""
        return (self.seconds - self.gradient_seconds) / self.gradient_seconds


def main(arguments: Sequence[str]) -> None:
    """Times every sweep, fits the exponents, prints the table and writes everything down."""
    parser = options("cost", __doc__, data=False, resumable=True)
    add = parser.add_argument
    add("--repeats", type=positive_int, default=7, help="calls whose median counts (7)")
    add("--largest", type=positive_int, default=10**6, help="leave out larger values of a sweep")
    given, rows = parser.parse_args(arguments), []
    sweeps = {n: [v for v in values if v <= given.largest] for n, values in SWEEPS.items()}
    own = {"repeats": given.repeats, "seed": given.seed}
    with experiment("cost", arguments, given, sum(map(len, sweeps.values()))) as run:
        for swept, values in sweeps.items():
            for value in values:
                measure = functools.partial(_measure, swept, value, **own)
                found = run.measure({**own, "swept": swept, "value": value}, measure)
                rows += [Row(*row) for row in found]
                run.tick(f"{swept} = {value}")
        fits = {f"{m} {s}": _exponent(rows, m, s) for m in METHODS for s in sweeps}
        measured = {"rows": [row._asdict() for row in rows], "exponents": fits}
        tables = [_costs(rows, sweeps), _exponents(fits)]
        said = {"layers": LAYERS, "base": BASE}
        run.record(measured, tables, {"cost": _plot(rows)}, said)


def _measure(swept: str, value: int, repeats: int, seed: int) -> list[Row]:
    n, d, k, s = ({**BASE, swept: value}[name] for name in "NDKS")
    params = chain_params([d] * LAYERS + [k], seed)
    key = jax.random.split(jax.random.key(seed), LAYERS + 1)[-1]
    batch = jax.random.uniform(key, (n, d)), jax.random.randint(key, (n,), 0, k)
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(chain(), loss)
    gradient = timed(jax.value_and_grad(objective), params, batch, repeats=repeats).median
    rows = []
    for method in METHODS if swept != "S" else ("kfac",):
        call = timed(_factors(objective, method, s), params, batch, repeats=repeats)
        rows.append(Row(swept, value, method, gradient, call.median))
    return rows


def _factors(objective: kfgn.Objective, method: str, samples: int) -> Callable[..., Any]:
    curvature_of = with_key(objective, method, samples=samples)

    def call(params: Any, batch: Any) -> Any:
        (value, grads), curvature = curvature_of(params, batch, jax.random.key(0))
        return value, grads, curvature.factors

    return call


def _exponent(rows: list[Row], method: str, swept: str) -> float | None:
    """Of the added seconds, least squares over the upper half of the sweep."""
    chosen = [r for r in rows if (r.method, r.swept) == (method, swept)]
    chosen = chosen[len(chosen) // 2 - 1 :] if len(chosen) > 2 else chosen
    seconds = [r.seconds - r.gradient_seconds for r in chosen]
    if len(chosen) < 2 or min(seconds) <= 0:
        return None
    values = [r.value for r in chosen]
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def _costs(rows: list[Row], sweeps: dict[str, list[int]]) -> Table:
    lines = []
    for swept, values in sweeps.items():
        for value in values:
            found = {r.method: r for r in rows if (r.swept, r.value) == (swept, value)}
            cells = [f"{found[m].excess:.2f}" if m in found else None for m in METHODS]
            lines.append([f"{swept} = {value}", *cells])
    title = "Added to value and gradient by the factors, in units of these"
    return table(title, ["", "KFRA", "KFLR", "KFAC"], lines)


def _exponents(fits: dict[str, float | None]) -> Table:
    lines = []
    for (method, swept), expected in EXPECTED.items():
        fit = fits.get(f"{method} {swept}")
        if swept != "S" or method == "kfac":
            lines.append([f"{method}, {swept}", figure(fit, ".2f"), expected])
    return table("Exponents", ["", "fitted", "by the counts, in the limit"], lines)


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    for axes, swept in zip(figure.subplots(1, len(SWEEPS)), SWEEPS, strict=True):
        for method in METHODS:
            chosen = [r for r in rows if (r.method, r.swept) == (method, swept)]
            seconds = [r.seconds - r.gradient_seconds for r in chosen]
            axes.plot([r.value for r in chosen], seconds, "o-", color=COLORS[method], label=method)
        gradients = {r.value: r.gradient_seconds for r in rows if r.swept == swept}
        axes.plot(list(gradients), list(gradients.values()), "k:", label="value and gradient")
        axes.set(xscale="log", yscale="log", xlabel=swept)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    figure.supylabel("seconds")
    return figure
