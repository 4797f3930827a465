"""``python -m benchmarks trainings``: small trainings as users write them, beside Adam.

Every task is a model, data and a loss, trained by what `kfgn.make` returns with nothing set, and by
Adam at three rates from the same start on the same batches. Steps take turns in one process, so
that what else the machine does slows both. Adam is shown at its best rate, once after as many steps
and once after as many seconds. A finished task is kept: `--resume` goes on with the next.
"""

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.table import Table

import kfgn
from benchmarks.experiments.trainings import images, others, sequences
from benchmarks.experiments.trainings.task import Task
from benchmarks.harness import interrupt
from benchmarks.harness.arguments import options, positive_int, positive_number, some_of
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.timing import compiled

NAME = "trainings"
RATES = (1e-2, 3e-3, 1e-3)  # of Adam
INVERSES = ("factored", "eigen", "ekfac")
TASKS: dict[str, Callable[[int], Task]] = {
    "classifier": images.classifier,
    "tabular": others.tabular,
    "convolutions": images.convolutions,
    "batch-norm": images.batch_norm,
    "autoencoder": images.autoencoder,
    "variational": images.variational,
    "transformer": sequences.transformer,
    "gru": sequences.adding,
    "lstm": sequences.lstm,
    "tied": sequences.tied,
    "sets": others.sets,
    "graphs": others.graphs,
    "poisson": others.poisson,
    "rewards": others.rewards,
    "contrastive": images.contrastive,
    "low-rank": images.low_rank,
    "experts": images.experts,
    "equilibrium": images.equilibrium,
}


class Trained(NamedTuple):
    """What a task gave."""

    method: str  # that `kfgn.make` took
    figure: str  # what is compared
    steps: int
    compile_seconds: float  # `kfgn.make` and tracing included
    adam_compile_seconds: float
    step_seconds: float  # median
    adam_step_seconds: float
    start: float
    reached: float
    adam_same_steps: float  # the best of the rates
    adam_same_seconds: float
    adam_steps: int  # in the same seconds
    skipped: int
    refused: int


def main(arguments: Sequence[str]) -> None:
    """Trains on every task, and writes the table."""
    parser = options(NAME, __doc__, data=False, resumable=True)
    add = parser.add_argument
    add("--steps", type=positive_int, default=200, help="of kfgn, for each task (200)")
    add("--only", type=some_of("task", TASKS), default=tuple(TASKS), help="tasks, with commas")
    known = some_of("inverse", INVERSES)
    add("--inverses", type=known, default=INVERSES[:1], help="of kfgn's factors (factored)")
    add("--damping", type=positive_number, help="kfgn's first τ, instead of its default")
    given = parser.parse_args(arguments)
    rows = list(itertools.product(given.only, given.inverses))
    with experiment(NAME, arguments, given, total=len(rows)) as experimenting:
        found: dict[str, Trained] = {}
        for name, inverse in rows:
            settings = {"task": name, "steps": given.steps, "seed": given.seed}
            changed: dict[str, Any] = {} if inverse == INVERSES[0] else {"inverse": inverse}

            def trained(name: str = name, changed: dict[str, Any] = changed) -> Any:
                return train(TASKS[name](given.seed), given.steps, given.seed, changed)._asdict()

            row = ", ".join([name, *changed.values()])
            changed |= {} if given.damping is None else {"step_damping": given.damping}
            found[row] = Trained(**experimenting.measure(settings | changed, trained))
            experimenting.tick(f"{row}: {found[row].reached:.3g}")
        measured = {name: own._asdict() for name, own in found.items()}
        experimenting.record(measured, [_table(found)], {})


class _Going:
    """One optimizer in its training."""

    def __init__(self, step: Callable[..., Any], carry: Any) -> None:
        self.step, self.carry, self.seconds = step, carry, list[float]()

    def advance(self, draw: Callable[..., Any], key: jax.Array) -> None:
        """A step on a batch of its own parameters; drawing it is not timed."""
        interrupt.check()
        batch = jax.block_until_ready(draw(key, self.carry[0]))
        start = time.perf_counter()
        self.carry = jax.block_until_ready(self.step(*self.carry, batch, key))
        self.seconds.append(time.perf_counter() - start)


def train(task: Task, steps: int, seed: int, changed: dict[str, Any] | None = None) -> Trained:
    """So many steps of kfgn, some options changed, and of Adam as many, and as many seconds."""
    draw, evaluate = jax.jit(task.draw), jax.jit(task.evaluate)
    batch, key = draw(jax.random.key(seed), task.params), jax.random.key(seed + 1)
    ours, method, compiling = _with_kfgn(task, batch, key, changed or {})
    adams, adam_compiling = _with_adam(task, batch, key)

    def best() -> float:
        figures = [float(evaluate(own.carry[0])) for own in adams]
        return min((x for x in figures if np.isfinite(x)), default=float("nan"))

    for k in range(steps):
        for own in (ours, *adams):
            own.advance(draw, jax.random.fold_in(key, k))
    same_steps = best()
    share = sum(ours.seconds) / np.mean([sum(own.seconds) for own in adams])
    adam_steps = max(steps, round(steps * share))
    for k, own in itertools.product(range(steps, adam_steps), adams):
        own.advance(draw, jax.random.fold_in(key, k))
    numbers = kfgn.diagnostics.record(ours.carry[1])
    return Trained(
        method,
        task.figure,
        steps,
        compiling,
        adam_compiling,
        float(np.median(ours.seconds)),
        float(np.median([own.seconds[:steps] for own in adams])),
        float(evaluate(task.params)),
        float(evaluate(ours.carry[0])),
        same_steps,
        best(),
        adam_steps,
        int(numbers["skipped"]),
        int(numbers["refused"]),
    )


def _with_kfgn(
    task: Task, batch: Any, key: jax.Array, changed: dict[str, Any]
) -> tuple[_Going, str, float]:
    """The training by what `kfgn.make` returns, its method, and what compiling took."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kfgn.errors.CostWarning)  # the table says it
        optimizer, curvature_fn = kfgn.make(task.objective, task.params, batch, **changed)
    making = time.perf_counter() - start
    methods = set[str]()

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        methods.add(curvature.settings.method)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    carry = task.params, optimizer.init(task.params)
    program, seconds, _ = compiled(step, *carry, batch, key)
    return _Going(program, carry), methods.pop(), making + seconds


def _with_adam(task: Task, batch: Any, key: jax.Array) -> tuple[list[_Going], float]:
    """The training by Adam at every rate, one program for all, and what compiling took."""
    adam = optax.inject_hyperparams(optax.adam)(RATES[0])

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        del key
        updates, state = adam.update(jax.grad(task.objective)(params, batch), state)
        return optax.apply_updates(params, updates), state

    starts = [(task.params, optax.inject_hyperparams(optax.adam)(r).init(task.params))
              for r in RATES]  # fmt: skip
    program, seconds, _ = compiled(step, *starts[0], batch, key)
    return [_Going(program, start) for start in starts], seconds


def _table(found: dict[str, Trained]) -> Table:
    columns = ("task", "method", "compiling", "a step", "start", "kfgn",
               "Adam, as many steps", "as many seconds")  # fmt: skip
    rows = []
    for name, own in found.items():
        rows.append([
            name, own.method,
            f"{own.compile_seconds / own.adam_compile_seconds:.1f}",
            f"{own.step_seconds / own.adam_step_seconds:.1f}",
            *(f"{x:.3g}" for x in (own.start, own.reached, own.adam_same_steps,
                                   own.adam_same_seconds)),
        ])  # fmt: skip
    return table("Compiling and a step, in Adam's; training losses", columns, rows)
