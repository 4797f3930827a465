"""``python -m benchmarks logistic``: which solvers bear batches that change (Veitch, section 4.1).

Logistic regression on 800 points of the plane, from batches of 10. "fixed" joins 80 batches that
stay, eq. (28) with R = 80, which is the full objective; "reshuffled" joins 50 that are drawn anew
for every iteration, "each value" for every evaluation. scipy's nonlinear conjugate gradients
(NLCG) and L-BFGS are given the objective as it is then: their line searches compare values of
different functions. The paper's points are hand-made and not published. Here they are two normal
clouds, once around the origin and once away from it, where one weight has to undo another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from benchmarks import BenchmarkError
from benchmarks.experiments.logistic.plots import TITLES, plot_boundaries, plot_losses
from benchmarks.experiments.logistic.solvers import Outcome, Points, Solvers
from benchmarks.harness.arguments import number, options, positive_int, positive_number
from benchmarks.harness.display import figure, table
from benchmarks.harness.experiment import Experiment, experiment

NAME = "logistic"
# Tables 1 and 2 of the paper: iterations, training loss, and accuracy (headed "Test error" there).
# It does not say how long Newton's steps without line search are; 50 iterations fit short ones.
PAPER: dict[tuple[str, str], tuple[int | None, float, float]] = {
    ("reshuffled", "Newton, search"): (None, 0.4019, 0.83),
    ("reshuffled", "Newton, short"): (None, 0.5613, 0.81),
    ("reshuffled", "L-BFGS"): (None, 0.6030, 0.51),
    ("reshuffled", "NLCG"): (None, 0.5989, 0.51),
    ("fixed", "Newton, search"): (8, 0.4058, 0.83),
    ("fixed", "Newton, short"): (50, 0.5617, 0.81),
    ("fixed", "L-BFGS"): (20, 0.4058, 0.83),
    ("fixed", "NLCG"): (31, 0.4058, 0.83),
}
RESHUFFLED = ("reshuffled", "each value")  # the samplings that depend on chance


def main(arguments: Sequence[str]) -> None:
    """Runs all solvers with all samplings on both sets of points, and writes what came out."""
    given = _parse(arguments)
    places = {"around the origin": 0.0, f"at ({given.offset:g}, {given.offset:g})": given.offset}
    found, tables, figures = {}, [], {}
    with experiment(NAME, arguments, given) as run, jax.enable_x64(True):  # as scipy computes
        for label, (place, offset) in zip(("centered", "shifted"), places.items(), strict=True):
            points = clouds(given.points, given.test_points, offset, given)
            found[place] = _run_all(points, given, run, place)
            tables += _tables(place, found[place])
            figures[f"losses_{label}"] = plot_losses(found[place], f"two clouds {place}")
            figures[f"boundaries_{label}"] = plot_boundaries(found[place], points)
        measured = {place: [o.report() for o in outcomes] for place, outcomes in found.items()}
        run.record(measured, tables, figures)


def _parse(arguments: Sequence[str]) -> Any:
    parser = options(NAME, __doc__, data=False)
    add = parser.add_argument
    add("--points", type=positive_int, default=800, help="to train on (800)")
    add("--test-points", type=positive_int, default=100, help="to classify (100)")
    add("--separation", type=number, default=1.9, help="of the clouds' centers (1.9)")
    add("--offset", type=number, default=5.0, help="of the second set from the origin (5)")
    add("--batch-size", type=positive_int, default=10, help="points in a batch (10)")
    add("--batches", type=positive_int, default=50, help="joined where they are drawn anew (50)")
    add("--iterations", type=positive_int, default=50, help="at most so many (50)")
    add("--epsilon", type=positive_number, default=1e-6, help="of eq. 29 (1e-6)")
    add("--newton-step", type=positive_number, default=0.01, help="the short fixed step (0.01)")
    add("--runs", type=positive_int, default=10, help="of every sampling by chance (10)")
    given = parser.parse_args(arguments)
    if given.batch_size * given.batches > given.points:
        raise BenchmarkError("--batches of --batch-size points must not be more than --points")
    if given.points % given.batch_size:
        raise BenchmarkError("--points must be a multiple of --batch-size")
    return given


def clouds(count: int, test_count: int, offset: float, given: Any) -> Points:
    """Two normal clouds of unit variance along the diagonal, with labels 0 and 1.

    At the default separation the best classifier is right on Φ(0.95) = 0.83 of the points.
    """
    rng = np.random.default_rng(given.seed)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(n) % 2).astype(np.float64)
        shift = (labels - 0.5) * given.separation / np.sqrt(2)
        return rng.normal(size=(n, 2)) + shift[:, None] + offset, labels[:, None]

    return Points(draw(count), draw(test_count))


def _run_all(points: Points, given: Any, experimenting: Experiment, place: str) -> list[Outcome]:
    """One run where the sampling is no matter of chance, and several where it is."""
    solvers = Solvers(points, given)
    jobs = [
        (sampling, solver, run)
        for sampling in ("full", "fixed", *RESHUFFLED)
        for solver in solvers.names(sampling)
        for run in range(given.runs if sampling in RESHUFFLED else 1)
    ]
    outcomes = []
    with experimenting.progress(f"{NAME}, {place}", len(jobs)) as ticker:
        for sampling, solver, run in jobs:
            outcomes.append(solvers.run(sampling, solver, given.seed + run))
            ticker.step(f"{sampling}, {solver}")
    return outcomes


def _tables(place: str, outcomes: Sequence[Outcome]) -> list[Table]:
    """One for each sampling; of several runs the median, and below it the least and greatest."""
    columns = (
        "solver", "iter.", "paper", "eq. 29", "loss", "paper", "accuracy", "paper", "ms/iter.", "s",
    )  # fmt: skip
    tables = []
    for sampling in dict.fromkeys(o.sampling for o in outcomes):
        own = [o for o in outcomes if o.sampling == sampling]
        rows = [
            _row(sampling, solver, [o for o in own if o.solver == solver])
            for solver in dict.fromkeys(o.solver for o in own)
        ]
        tables.append(table(f"two clouds {place}: {TITLES[sampling]}", columns, rows))
    return tables


def _row(sampling: str, solver: str, runs: Sequence[Outcome]) -> list[Any]:
    iterations, loss, accuracy = PAPER.get((sampling, solver), (None, None, None))
    equation = [o.iterations_of_equation_29 for o in runs]
    return [
        solver, _range([o.iterations for o in runs], "g"), iterations,
        None if None in equation else _range(equation, "g"),
        _range([o.losses[-1] for o in runs], ".4f"), figure(loss, ".4f"),
        _range([o.test_accuracy for o in runs], ".2f"), figure(accuracy, ".2f"),
        _median([o.milliseconds for o in runs]), _median([o.seconds for o in runs]),
    ]  # fmt: skip


def _range(values: Sequence[Any], form: str) -> str:
    """The median, and below it the least and the greatest where they differ."""
    text = format(np.median(values), form)
    low, high = (format(end, form) for end in (min(values), max(values)))
    return text if low == high else f"{text}\n{low}-{high}"


def _median(values: Sequence[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    return f"{np.median(known):.2f}" if known else None
