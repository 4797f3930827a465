"""``python -m benchmarks poisson``: a physics-informed network beside L-BFGS and Adam.

-Δu = f in the unit square with u = 0 on its boundary, whose solution is sin(πx) sin(πy). Two tanh
layers are trained on the same points at every update, an example being one of the interior and
one of the boundary, in float64, until the relative L2 error on a grid is small enough. The methods
take turns of a second of updates each, so that what else the machine does slows all of them.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import all_seeds, options, positive_int, positive_number
from benchmarks.harness.display import figure, table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain_params, hidden_values
from benchmarks.harness.optimizers import Optimizer, second_order, with_gradient
from benchmarks.harness.plots import Curve, against
from benchmarks.harness.race import Point, timed_steps
from benchmarks.harness.timing import compiled

NAME = "poisson"
RATES = (1e-2, 3e-3, 1e-3)  # of Adam, each decayed to zero by a cosine
GOALS = (1e-2, 1e-3, 1e-4)
LOOK = 10  # updates between errors
# Of the residuals: the boundary's weighs more, as it has no second derivatives.
INTERIOR, BOUNDARY = 0.1, 10.0
COLORS = {"kflr": "tab:purple", "L-BFGS": "tab:blue"}


class Run(NamedTuple):
    """One training: its errors, and what compiling took."""

    method: str
    seed: int
    compile_seconds: float
    points: list[Point]  # `loss` is the relative L2 error

    def seconds_to(self, goal: float) -> float | None:
        """The time of updates until the error was below the goal."""
        return next((p.seconds for p in self.points if p.loss < goal), None)


def main(arguments: Sequence[str]) -> None:
    """Trains with every method from the same starts, and writes the table and the figure."""
    parser = options(NAME, __doc__, data=False)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=2, help="how many, from --seed on (2)")
    add("--width", type=positive_int, default=32, help="of the two layers (32)")
    add("--points", type=positive_int, default=500, help="inside, and on the boundary (500)")
    add("--goal", type=positive_number, default=GOALS[-1], help="error to stop at (1e-4)")
    add("--seconds", type=positive_number, default=60.0, help="of updates, at most (60)")
    add("--adam-updates", type=positive_int, default=30_000, help="until its rate is 0 (30000)")
    given = parser.parse_args(arguments)
    with experiment(NAME, arguments, given) as experimenting, jax.enable_x64(True):
        runs: list[Run] = []
        for seed in all_seeds(given):
            runs += _race(seed, given)
            experimenting.console.print(_table(runs[-len(RATES) - 2 :], given))
        experimenting.record(
            list(map(_measured, runs)), [_table(runs, given)], {"errors": _plot(runs)}
        )


def solution(x: jax.Array) -> jax.Array:
    """`[..., 2]` to `[...]`."""
    return jnp.prod(jnp.sin(jnp.pi * x), axis=-1)


def network(params: Any, x: jax.Array) -> jax.Array:
    """The trained function of one point."""
    return hidden_values(params, x)[-1][0]


def residuals(params: Any, points: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of the equation at interior points, and of the boundary's values, `[N, 2]`."""

    def laplacian(x: jax.Array) -> jax.Array:
        def second(direction: jax.Array) -> jax.Array:
            def slope(x: jax.Array) -> jax.Array:
                return jax.jvp(lambda x: network(params, x), (x,), (direction,))[1]

            return jax.jvp(slope, (x,), (direction,))[1]

        return jnp.sum(jax.vmap(second)(jnp.eye(2, dtype=x.dtype)))

    def one(inside: jax.Array, edge: jax.Array) -> jax.Array:
        equation = laplacian(inside) + 2 * jnp.pi**2 * solution(inside)
        return jnp.stack([INTERIOR * equation, BOUNDARY * network(params, edge)])

    return jax.vmap(one)(*points)


def _problem(seed: int, given: Any) -> tuple[kfgn.Objective, Any, Any]:
    """The objective, the parameters it is started with, and the batch."""
    rng = np.random.default_rng(seed)
    inside, along = rng.uniform(size=(given.points, 2)), rng.uniform(size=given.points)
    side = np.arange(given.points) % 2  # which coordinate is 0 or 1
    edge = np.where(np.arange(2) == side[:, None], np.arange(given.points)[:, None] // 2 % 2,
                    along[:, None])  # fmt: skip
    batch = ((jnp.asarray(inside), jnp.asarray(edge)), jnp.zeros((given.points, 2)))
    params = chain_params((2, given.width, given.width, 1), seed, dtype=jnp.float64)
    return kfgn.Objective(residuals, kfgn.losses.half_squared_error), params, batch


def _optimizers(objective: kfgn.Objective, params: Any, batch: Any, given: Any) -> list[Optimizer]:
    def own(params: Any) -> jax.Array:
        return objective(params, batch)

    search = optax.lbfgs(memory_size=50)

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        # The line search has value and gradient at the new point in its state.
        value, grads = optax.value_and_grad_from_state(own)(params, state=state)
        updates, state = search.update(grads, state, params, value=value, grad=grads, value_fn=own)
        return optax.apply_updates(params, updates), state, value

    rates = {r: optax.cosine_decay_schedule(r, given.adam_updates) for r in RATES}
    return [
        second_order("kflr", objective, params, batch, {}, model_examples=None),
        Optimizer("L-BFGS", search.init, step),
        *(with_gradient(f"Adam, {r:g}", objective, optax.adam(rates[r])) for r in RATES),
    ]


def _race(seed: int, given: Any) -> list[Run]:
    """All methods from one start, in turns."""
    objective, params, batch = _problem(seed, given)
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 50)] * 2), axis=-1).reshape(-1, 2)
    truth = solution(grid)

    @jax.jit
    def error(params: Any) -> jax.Array:
        found = jax.vmap(network, (None, 0))(params, grid)
        return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)

    going: dict[str, Iterator[Point]] = {}
    runs = {}
    for optimizer in _optimizers(objective, params, batch, given):
        seconds, trained = _training(optimizer, params, batch, error, given)
        going[optimizer.name] = trained
        runs[optimizer.name] = Run(optimizer.name, seed, seconds, [])
    for turn in itertools.count(1):
        for name in list(going):
            for point in going[name]:
                runs[name].points.append(point)
                if not point.loss > given.goal:  # or not finite
                    del going[name]
                    break
                if point.seconds > turn:
                    break
            else:
                del going[name]
        if not going:
            break
    return list(runs.values())


def _training(
    optimizer: Optimizer, params: Any, batch: Any, error: Callable[[Any], jax.Array], given: Any
) -> tuple[float, Iterator[Point]]:
    """How long its step compiles, and the training, which has not begun."""
    state = optimizer.init(params)
    step, seconds, _ = compiled(optimizer.step, params, state, batch, jax.random.key(0))

    def points() -> Iterator[Point]:
        data = itertools.repeat(batch)
        for at in timed_steps(step, params, state, data, seconds=given.seconds):
            if at.update % LOOK == 0 or at.seconds >= given.seconds:
                yield Point(at.update, at.seconds, float(error(at.params)))

    return seconds, points()


def _measured(run: Run) -> dict[str, Any]:
    last, every = run.points[-1], len(run.points) // 100 + 1
    return {
        **run._asdict(),
        "points": [list(point) for point in run.points[::every]],
        "updates": last.update,
        "error": last.loss,
        **{f"seconds_to_{goal:g}": run.seconds_to(goal) for goal in GOALS},
    }


def _table(runs: Sequence[Run], given: Any) -> Table:
    columns = ("method", "seed", "compiling, s", "updates", "ms each",
               *(f"s to {goal:g}" for goal in GOALS), "error")  # fmt: skip
    rows = []
    for run in runs:
        last = run.points[-1]
        rows.append([
            run.method, run.seed, f"{run.compile_seconds:.1f}", last.update,
            f"{1e3 * last.seconds / last.update:.2f}",
            *(figure(run.seconds_to(goal), ".2f") for goal in GOALS), f"{last.loss:.1e}",
        ])  # fmt: skip
    return table("Poisson's equation: seconds of updates to a relative L2 error", columns, rows)


def _plot(runs: Sequence[Run]) -> Figure:
    curves = []
    for run in runs:
        columns = {name: [getattr(p, name) for p in run.points] for name in Point._fields}
        style = {"color": COLORS.get(run.method, "tab:orange"), "linewidth": 0.8}
        first = run.seed == runs[0].seed
        curves.append(Curve(run.method if first else None, columns, style))
    found, grid = against(curves, {"loss": "relative L2 error"})
    for axes in grid.flat:
        axes.set(xscale="log", yscale="log")
    grid[0, 0].legend(fontsize="small")
    return found
