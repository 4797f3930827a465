"""The tables of `fashion`, with the paper's numbers beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.experiments.fashion.hessian_free import DAMPINGS, PRECONDITIONERS, method_name
from benchmarks.experiments.fashion.training import Point, Run
from benchmarks.harness.display import table

# Tables 3 and 4 of the paper, by hidden layers and method: accuracy on training and dev images
# after 100 iterations, and seconds of an iteration.
PAPER: dict[tuple[int, str], tuple[float, float, float]] = {
    (1, "GD"): (0.7232, 0.7195, 8.2),
    (1, "NLCG"): (0.8363, 0.8336, 15.0),
    (1, "L-BFGS-B"): (0.8307, 0.8293, 11.3),
    (2, "GD"): (0.7029, 0.7038, 10.2),
    (2, "NLCG"): (0.7627, 0.7650, 24.3),
    (2, "L-BFGS-B"): (0.7782, 0.7845, 20.2),
}
OF_PAPER = ("GD", "NLCG", "L-BFGS-B")
NEAR = 1.01  # times the lowest objective of all: where a method counts as nearly there
FRACTIONS = (0.1, 0.25, 0.5, 1.0)  # of a run, at which the gap is shown


def all_tables(found: Any, given: Any) -> list[Table]:
    """Those for which there are measurements."""
    tables = []
    for hidden, runs in found.networks.items():
        tables.append(_paper_table(hidden, runs, given))
        if hidden in found.equal_seconds and not given.paper_only:
            tables.append(_equal_time(hidden, runs, found.equal_seconds[hidden], given))
            if any(run.cg_iterations for run in runs):
                tables.append(_conjugate_gradients(hidden, runs))
    if found.networks:
        tables.append(_gaps(found.networks))
    if found.gaps:
        tables.append(_reasons(found))
    if found.conditioned:
        tables.append(_conditioned(found.conditioned, given.l2))
    if found.depths:
        tables.append(_depths(found.depths, given.updates))
    return tables


def _kind(run: Run) -> str:
    return run.method.split(",")[0]


def _paper_table(hidden: int, runs: Sequence[Run], given: Any) -> Table:
    mine = [run for run in runs if _kind(run) in OF_PAPER]
    unit = min((_each(run) or math.inf for run in mine if _kind(run) == "GD"), default=None)
    rows = []
    for run in mine:
        end, his = run.last, PAPER.get((hidden, _kind(run)))
        cost = PAPER[hidden, "GD"][2] if his else None
        each = _each(run)
        rows.append((
            run.method, end.iteration, _percent(end.train_accuracy), _percent(his and his[0]),
            _percent(end.dev_accuracy), _percent(his and his[1]), f"{end.objective:.4f}",
            f"{end.dev_loss:.4f}", each and f"{each:.3f}", each and unit and f"{each / unit:.2f}",
            his and cost and f"{his[2] / cost:.2f}",
        ))  # fmt: skip
    columns = (
        "method", "iter.", "train %", "paper", "dev %", "paper", "objective", "dev loss",
        "s/iter.", "x GD", "paper",
    )  # fmt: skip
    title = (
        f"{hidden} hidden of {given.width}, λ = {given.l2:g}, {given.images} images (paper: "
        "60000); GD: gradient descent, at a rate"
    )
    return table(title, columns, rows)


def _equal_time(hidden: int, runs: Sequence[Run], seconds: float, given: Any) -> Table:
    rows, near = [], NEAR * min(run.last.objective for run in runs)
    for run in runs:
        if _kind(run) in OF_PAPER and run.method != "L-BFGS-B":
            continue
        end, each, compiled = run.last, _each(run), run.compile_seconds
        reached = run.seconds_to(near)
        rows.append((
            run.method + (f" ({run.note})" if run.note == "diverged" else ""), end.iteration,
            f"{end.seconds:.1f}", each and f"{1e3 * each:.0f}", compiled and f"{compiled:.1f}",
            f"{end.objective:.4f}", reached and f"{reached:.1f}", f"{end.dev_loss:.4f}",
            _percent(end.train_accuracy), _percent(end.dev_accuracy),
        ))  # fmt: skip
    columns = (
        "method", "updates", "seconds", "ms each", "compiling", "objective", "s to near",
        "dev loss", "train %", "dev %",
    )  # fmt: skip
    limit = "--seconds" if given.seconds else f"the time of {given.iterations} of L-BFGS-B"
    title = (
        f"{hidden} hidden, {seconds:.1f} s of training each ({limit}), without compiling; near: "
        f"within {NEAR - 1:.0%} of the lowest objective"
    )
    return table(title, columns, rows)


def _conjugate_gradients(hidden: int, runs: Sequence[Run]) -> Table:
    by_name = {run.method: run for run in runs}
    plain = by_name.get(method_name("none"))
    rows = []
    for name in PRECONDITIONERS:
        run = by_name.get(method_name(name))
        if run is None or plain is None or not run.cg_iterations:
            continue
        counts, start, end = run.cg_iterations, run.points[0], run.last
        reached = run.seconds_to(plain.last.objective)
        rows.append((
            name, len(counts), f"{statistics.mean(counts):.1f}",
            f"{statistics.mean(counts[-10:]):.1f}", max(counts), f"{run.damping:.2g}",
            f"{end.objective:.4f}", f"{(start.objective - end.objective) / end.seconds:.4f}",
            reached and f"{reached:.1f}",
        ))  # fmt: skip
    columns = (
        "preconditioner", "updates", "CG iter./update", "last 10", "most", "last λ", "objective",
        "fall/s", "s to none's end",
    )  # fmt: skip
    return table(f"{hidden} hidden, Hessian-free by preconditioner", columns, rows)


def _gaps(networks: dict[int, list[Run]]) -> Table:
    rows = []
    for hidden, runs in networks.items():
        for run in runs:
            cells = [f"{100 * _at(run, part).gap:+.2f}" for part in FRACTIONS]
            his = PAPER.get((hidden, _kind(run)))
            shown = his and f"{100 * (his[0] - his[1]):+.2f}"
            rows.append((f"{run.method}, {hidden} hidden", *cells, shown))
    columns = ("method", *(f"{part:.0%} of its time" for part in FRACTIONS), "paper")
    return table("train less dev accuracy, in points, as training goes on", columns, rows)


def _at(run: Run, part: float) -> Point:
    """The last measurement within this part of the run's seconds."""
    limit = part * run.last.seconds
    return [p for p in run.points if p.seconds <= limit][-1]


def _reasons(found: Any) -> Table:
    rows = []
    for case in found.gaps:
        end = case["points"][-1]
        train, dev = end["train_accuracy"], end["dev_accuracy"]
        rows.append((
            f"{case['images']} images, λ = {case['l2']:g}", end["iteration"], _percent(train),
            _percent(dev), f"{100 * (train - dev):+.2f}", f"{end['train_loss']:.4f}",
            f"{end['dev_loss']:.4f}",
        ))  # fmt: skip
    title = (
        f"what makes the gap: L-BFGS-B, {found.gaps[0]['hidden']} hidden; dev images that are "
        f"training images too: {found.repeated_images}"
    )
    columns = ("", "iter.", "train %", "dev %", "gap", "train loss", "dev loss")
    return table(title, columns, rows)


def _conditioned(conditioned: dict[str, dict[str, list[int]]], l2: float) -> Table:
    rows = [
        (f"{place}: {name}", *counts)
        for place, found in conditioned.items()
        for name, counts in found.items()
    ]
    columns = ("", *(f"λ = {damping:g}" for damping in DAMPINGS))
    title = f"CG iterations to the default tolerance at one place, damping λ + {l2:g} (at most 250)"
    return table(title, columns, rows)


def _depths(depths: Sequence[Any], updates: int) -> Table:
    methods = [run.method for run in depths[0].runs]
    rows = []
    for depth in depths:
        cells = []
        for run in depth.runs:
            cells.append(f"{_percent(run.last.train_accuracy)}/{_percent(run.last.dev_accuracy)}")
        rows.append((str(depth.hidden), f"{depth.gradients[0]:.1e}", *cells))
    title = (
        f"digits, logistic units, no penalty: the first kernel's gradient at the start over the "
        f"last's; train/dev % after {updates} updates on all images (first order: the better rate)"
    )
    return table(title, ("hidden", "first/last", *methods), rows)


def _each(run: Run) -> float | None:
    return run.last.seconds / run.last.iteration if run.last.iteration else None


def _percent(value: float | None) -> str | None:
    return None if value is None or not math.isfinite(value) else f"{100 * value:.2f}"
