"""``python -m benchmarks rosenbrock``: gradient descent and Newton's method in a curved ravine.

The function (a - x)^2 + b (y - x^2)^2 of Veitch's figures 1 and 2, with and without line search.
Written as two squared residuals it has a Gauss-Newton matrix too, which is shown beside them. The
paper gives no point to start from: the default is the usual one, (-1.2, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import finite, options, positive_int, positive_number
from benchmarks.harness.display import figure, table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.measures import iterations_to_tolerance
from benchmarks.harness.optimizers import with_gradient

NAME = "rosenbrock"
# The function has no data: one example without meaning stands for them.
BATCH = (np.zeros((1, 1)), np.zeros((1, 2)))
SEARCH_STEPS = 30  # of a line search, at most
ROUGH = 1e-3  # a distance from the minimum that is reached by rough methods too
MARGIN = 4.0  # around the start and the minimum, where the figure shows what steps overshoot
DIVERGED = 1e9  # what is larger is not plotted
COLORS = {
    "gradient": "tab:gray",
    "gradient, line search": "tab:orange",
    "Newton": "tab:red",
    "Newton, line search": "tab:blue",
    "Gauss-Newton": "tab:green",
}


class Run(NamedTuple):
    """One method's way from the start: `[K + 1, 2]` points and the function's values there."""

    name: str
    points: np.ndarray
    values: np.ndarray
    distances: np.ndarray  # from the minimum

    def iterations_to(self, distance: float) -> int | None:
        """How many iterations until the minimum is so near."""
        near = self.distances <= distance
        return int(np.argmax(near)) if near.any() else None

    def order(self) -> float | None:
        """log e_{k+1}/e_k over log e_k/e_{k-1}, at the end: 2 where convergence is quadratic."""
        e = self.distances[(self.distances > 1e-14) & np.isfinite(self.distances)]
        if len(e) < 3 or not np.all(np.diff(e[-3:]) < 0):
            return None
        return float(np.log(e[-1] / e[-2]) / np.log(e[-2] / e[-3]))


def main(arguments: Sequence[str]) -> None:
    """Runs all methods, and writes the table and the two figures."""
    parser = options(NAME, __doc__, data=False)
    add = parser.add_argument
    add("--a", type=finite, default=1.0, help="the minimum is at (a, a^2) (1)")
    add("--b", type=positive_number, default=50.0, help="how steep the ravine is (50)")
    add("--start", type=finite, nargs=2, default=[-1.2, 1.0], metavar=("X", "Y"))
    add("--step", type=positive_number, default=1e-3, help="gradient descent's fixed step (1e-3)")
    add("--iterations", type=positive_int, default=100_000, help="at most so many (100000)")
    add("--tolerance", type=positive_number, default=1e-10, help="distance to stop at (1e-10)")
    add("--epsilon", type=positive_number, default=1e-6, help="of eq. 29, on values (1e-6)")
    given = parser.parse_args(arguments)
    objective = rosenbrock(given.a, given.b)
    methods, runs = _methods(objective, given.step), []
    with (
        experiment(NAME, arguments, given, len(methods)) as experimenting,
        jax.enable_x64(True),  # to see the last quadratic steps
    ):
        for name, method in methods.items():
            runs.append(_run(name, method, objective, given))
            experimenting.tick(name)
        figures = {
            "paths": plot_paths(runs, objective, given),
            "convergence": plot_convergence(runs, given),
        }
        measured = [_measured(run, given) for run in runs]
        experimenting.record(measured, [_table(runs, given)], figures)


def rosenbrock(a: float, b: float) -> kfgn.Objective:
    """Rosenbrock's function as half the squares of two residuals."""

    def residuals(point, inputs):
        x, y = point
        both = math.sqrt(2.0) * jnp.stack([a - x, math.sqrt(b) * (y - x**2)])
        return jnp.broadcast_to(both, (len(inputs), 2))

    return kfgn.Objective(residuals, kfgn.losses.half_squared_error)


def _methods(objective: kfgn.Objective, step: float) -> dict[str, Any]:
    search = optax.scale_by_zoom_linesearch
    return {
        "gradient": optax.sgd(step),
        "gradient, line search": optax.chain(
            optax.sgd(1.0), search(SEARCH_STEPS, initial_guess_strategy="keep")
        ),
        "Newton": kfgn.solvers.newton(objective),
        "Newton, line search": optax.chain(
            kfgn.solvers.newton(objective), search(SEARCH_STEPS, initial_guess_strategy="one")
        ),
        "Gauss-Newton": optax.chain(_gauss_newton(objective), optax.scale(-1.0)),
    }


def _gauss_newton(objective: kfgn.Objective) -> optax.GradientTransformationExtraArgs:
    """The gradient, solved with the Gauss-Newton matrix."""

    def update(updates, state, params=None, *, batch, **_):
        matrix = kfgn.gauss_newton(objective).dense(params, batch)
        return jnp.linalg.solve(matrix, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _run(name: str, method: Any, objective: kfgn.Objective, given: Any) -> Run:
    """Iterates until the minimum is near, the numbers are not finite, or they have been enough."""
    made = with_gradient(name, objective, method)
    start = jnp.asarray(given.start)
    minimum = jnp.array([given.a, given.a**2])

    def step(carry):
        count, point, state, points = carry
        point, state, _ = made.step(point, state, BATCH, jax.random.key(0))
        return count + 1, point, state, points.at[count + 1].set(point)

    def goes_on(carry):
        count, point = carry[:2]
        far = jnp.linalg.norm(point - minimum) > given.tolerance
        return far & (count < given.iterations) & jnp.all(jnp.isfinite(point))

    points = jnp.zeros((given.iterations + 1, 2)).at[0].set(start)
    carry = (jnp.asarray(0), start, made.init(start), points)
    count, _, _, points = jax.jit(lambda c: jax.lax.while_loop(goes_on, step, c))(carry)
    points = points[: int(count) + 1]
    values = jax.vmap(lambda p: objective(p, BATCH))(points)
    distances = jnp.linalg.norm(points - minimum, axis=1)
    return Run(name, np.asarray(points), np.asarray(values), np.asarray(distances))


def _measured(run: Run, given: Any) -> dict[str, Any]:
    finite = bool(np.isfinite(run.values[-1]))
    return {
        "method": run.name,
        "iterations": len(run.points) - 1,
        "reached": run.iterations_to(given.tolerance) is not None,
        f"iterations_to_{ROUGH}": run.iterations_to(ROUGH),
        "iterations_of_equation_29": iterations_to_tolerance(run.values, given.epsilon),
        "order": run.order(),
        "highest_value": float(np.max(run.values)) if finite else None,
        "final_value": float(run.values[-1]) if finite else None,
        "final_distance": float(run.distances[-1]) if finite else None,
        "final_point": run.points[-1].tolist() if finite else None,
    }


def _table(runs: Sequence[Run], given: Any) -> Table:
    columns = (
        "method", f"to {ROUGH:g}", f"to {given.tolerance:g}", f"eq. 29, {given.epsilon:g}",
        "order", "highest f", "final f", "distance",
    )  # fmt: skip
    rows = []
    for run in runs:
        rows.append([
            run.name, run.iterations_to(ROUGH), run.iterations_to(given.tolerance),
            iterations_to_tolerance(run.values, given.epsilon),
            figure(run.order(), ".2f"), f"{np.max(run.values):.4g}",
            f"{run.values[-1]:.2g}", f"{run.distances[-1]:.2g}",
        ])  # fmt: skip
    title = f"Rosenbrock's function, a={given.a:g}, b={given.b:g}: iterations to a distance"
    return table(title, columns, rows)


def plot_paths(runs: Sequence[Run], objective: kfgn.Objective, given: Any) -> Figure:
    """Figure 1 of the paper: the iterates over the function's contours."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    ends = np.array([given.start, [given.a, given.a**2], [0.0, 0.0]])
    near = np.concatenate([run.points for run in runs])
    near = near[np.all(np.abs(near - ends.mean(axis=0)) < MARGIN, axis=1)]
    seen = np.concatenate([ends, near])
    low, high = seen.min(axis=0) - 0.3, seen.max(axis=0) + 0.3
    x, y = (np.linspace(low[k], high[k], 300) for k in range(2))
    grid = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1))
    heights = jax.vmap(jax.vmap(lambda p: objective(p, BATCH)))(grid)
    levels = np.geomspace(0.05, float(jnp.max(heights)), 18)
    axes.contour(x, y, np.asarray(heights), levels=levels, colors="0.8", linewidths=0.8)
    for run in runs:
        points = run.points[np.all(np.abs(run.points) < DIVERGED, axis=1)]
        label = f"{run.name} ({len(run.points) - 1} iterations)"
        marker = "o" if len(points) < 100 else ""
        axes.plot(*points.T, label=label, color=COLORS[run.name], marker=marker, markersize=4)
    axes.plot(given.a, given.a**2, "k*", markersize=12, label="minimum", linestyle="")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="x", ylabel="y")
    axes.legend(loc="lower left", fontsize="small")
    return figure


def plot_convergence(runs: Sequence[Run], given: Any) -> Figure:
    """Figure 2 of the paper, with the distance from the minimum beside the values."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, field, label in zip(
        figure.subplots(1, 2), ("distances", "values"), ("|x - x*|", "f(x)"), strict=True
    ):
        for run in runs:
            # Counted from one, for the logarithm; a value of zero has none and is left out.
            shown = getattr(run, field)
            shown = np.where((shown > 0) & (shown < DIVERGED), shown, np.nan)
            count = 1 + np.arange(len(shown))
            marker = "o" if len(shown) < 100 else ""
            axes.loglog(
                count, shown, color=COLORS[run.name], marker=marker, markersize=3, label=run.name
            )
        axes.set(xlabel="iterations + 1", ylabel=label)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize="small")
    figure.suptitle(f"Rosenbrock's function, a={given.a:g}, b={given.b:g}")
    return figure
