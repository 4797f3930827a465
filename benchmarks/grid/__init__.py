"""``python -m benchmarks grid``: section 5.1, first-order methods at many settings, KFRA and KFAC.

Every first-order method trains the autoencoder at every learning rate and decay period of a grid
(the rate halves after each period), Adam also at its default; KFRA and KFAC have default settings,
with and without the moving average. All have the same start and the same batches, and first- and
second-order methods about the same time. By default the network is a smaller one, so that three
data sets take about an hour on two cores; --full has the paper's network, grid and updates, for a
GPU, where the settings of one method train side by side. An interrupted command goes on with
--resume.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import kfgn
from benchmarks import BenchmarkError, experiment, race
from benchmarks.arguments import names, number, positive_int, positive_number, widths
from benchmarks.datasets import NAMES, DataError, load
from benchmarks.grid import settings as grid
from benchmarks.grid.ledger import Ledger
from benchmarks.grid.report import best_of_adam, claims_table, losses_table, plot
from benchmarks.grid.settings import Setting
from benchmarks.models import ENCODER, Autoencoder, initial_params
from benchmarks.optimizers import Optimizer, closest

EVALUATED = 10_000  # training images
EVALUATIONS = 30  # of every training
TIMED = 40  # updates, of one setting where many train side by side
FIRST_ORDER = ("adam", "sgd", "momentum", "nesterov")
SECOND_ORDER = ("kfra", "kfac")
FULL = {
    "layers": ENCODER, "updates": 40_000, "second_order_updates": 5_000, "stride": 1,
    "periods": (1.0, 0.5, 0.25, 0.125, 0.0625),
}  # fmt: skip
FULL_FACES = 4  # times as many updates on FACES

Runs = dict[Setting, dict[int, list[race.Point]]]  # by setting and seed


class Task(NamedTuple):
    """One data set's autoencoder, ready to train, with how long that takes."""

    data: str
    images: np.ndarray
    objective: Any
    start: Callable[[int], Any]  # of a seed: the parameters
    evaluate: Callable[[Any], Any]
    updates: int
    second_order_updates: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all of the grid on every data set; writes the results after each."""
    options = _parse(arguments)
    console, ledger = Console(), Ledger(options.out / "runs.jsonl", options.resume)
    tasks = [_task(name, options) for name in options.data]
    said = {key: str(value) for key, value in vars(options).items() if key != "data_dir"}
    measured, tables = {}, []
    for task in tasks:
        runs = _run_all(task, options, ledger, console)
        measured[task.data] = [
            {**setting._asdict(), "label": setting.label, "seed": seed, "points": points}
            for setting, seeds in runs.items()
            for seed, points in seeds.items()
        ]
        tables += [losses_table(task.data, runs), claims_table(task.data, runs)]
        shown = console if task is tasks[-1] else Console(quiet=True)
        experiment.record(options.out, "grid", arguments, said, measured, tables, shown)
        plot(options.out / f"{task.data}.png", task.data, runs)
    ledger.finish()
    return 0


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = experiment.options("grid", __doc__)
    add = parser.add_argument
    add("--data", type=names, default=("curves", "mnist", "faces"), help="(curves,mnist,faces)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="(250,125,60,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--updates", type=positive_int, default=1200, help="of first-order methods (1200)")
    add("--second-order-updates", type=positive_int, default=240, help="(240)")
    add("--methods", type=names, default=FIRST_ORDER, help=f"({','.join(FIRST_ORDER)})")
    add("--exponents", type=widths, default=tuple(range(6, 14)), help="k of rates 2^-k (6,...,13)")
    periods = "parts of the updates after which rates halve (1,0.25,0.0625)"
    add("--periods", type=_parts, default=(1.0, 0.25, 0.0625), help=periods)
    add(
        "--stride", type=positive_int, default=2, help="others than Adam have every so manieth rate"
    )
    add("--seeds", type=positive_int, default=2, help="of second order and the best Adam (2)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    together = "settings that train at once (1 on a CPU, all of a method elsewhere)"
    add("--together", type=positive_int, help=together)
    add("--full", action="store_true", help="the paper's network, grid and updates")
    add("--resume", action="store_true", help="go on after an interruption")
    options = parser.parse_args(arguments)
    for option, known in (("data", NAMES), ("methods", FIRST_ORDER)):
        for name in getattr(options, option):
            if name not in known:
                raise closest(option, name, known)
    if "adam" not in options.methods or not options.data:
        raise BenchmarkError("--data needs a data set, and --methods adam, to compare with")
    if options.full:
        vars(options).update(FULL)
    if options.together is None:
        options.together = 1 if jax.default_backend() == "cpu" else 1000
    return options


def _parts(text: str) -> tuple[float, ...]:
    found = tuple(positive_number(part) for part in text.split(","))
    if max(found) > 1:
        raise BenchmarkError(f"--periods takes parts of all updates, up to 1, not {text!r}")
    return found


def _task(name: str, options: Any) -> Task:
    try:
        data = load(name, data_dir=options.data_dir)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    images = data.train
    if len(images) < options.batch_size:
        raise BenchmarkError(f"{name} has {len(images)} images, fewer than a batch")
    model = Autoencoder(images.shape[1], options.layers)
    objective = kfgn.Objective(model.apply, getattr(kfgn.losses, data.loss), l2=options.l2)
    held = jnp.asarray(images[:EVALUATED])
    longer = FULL_FACES if options.full and name == "faces" else 1
    return Task(
        name, images, objective, functools.cache(lambda seed: initial_params(model, seed)),
        jax.jit(lambda p: objective.mean_loss(p, (held, held))),
        longer * options.updates, longer * options.second_order_updates,
    )  # fmt: skip


def _run_all(task: Task, options: Any, ledger: Ledger, console: Console) -> Runs:
    first = grid.first_order_settings(
        options.methods, options.exponents, options.periods, options.stride
    )
    second = grid.second_order_settings(SECOND_ORDER)
    seeds = range(options.seed, options.seed + options.seeds)
    steps = {name: grid.first_order_step(name, task.objective) for name in options.methods}
    total = len(first) + len(seeds) * len(second) + 2 * (len(seeds) - 1)
    runs: Runs = {}
    with experiment.progress(console, task.data, total) as ticker:

        def finish(found: dict[Setting, list[race.Point]], seed: int) -> None:
            for setting, points in found.items():
                runs.setdefault(setting, {})[seed] = points
                ticker.step(f"{setting.label}: {points[-1].loss:.2f}")

        for setting in second:
            made = _second_order(task, setting, options)
            for seed in seeds:
                finish(_train_second_order(task, setting, made, seed, options, ledger), seed)
        for method in options.methods:
            own = [setting for setting in first if setting.method == method]
            for at in range(0, len(own), options.together):
                group = own[at : at + options.together]
                finish(
                    _first_order(task, group, steps[method], seeds[0], options, ledger), seeds[0]
                )
        default = Setting("adam", grid.ADAM_DEFAULT, 1.0)
        for setting in {best_of_adam(runs)[0]: None, default: None}:
            for seed in seeds[1:]:
                finish(_first_order(task, [setting], steps["adam"], seed, options, ledger), seed)
    return runs


def _second_order(task: Task, setting: Setting, options: Any) -> Optimizer:
    """One optimiser for all seeds: it is compiled once."""
    first = jnp.asarray(task.images[: options.batch_size])
    start = task.start(options.seed)
    return grid.second_order_optimizer(setting, task.objective, start, (first, first))


def _train_second_order(
    task: Task, setting: Setting, made: Optimizer, seed: int, options: Any, ledger: Ledger
) -> dict[Setting, list[race.Point]]:
    run = _identity(task, setting, seed, options, task.second_order_updates)
    points = ledger.find(run)
    if points is None:
        points = _train(task, made, task.start(seed), seed, options, task.second_order_updates)
        ledger.add(run, points)
    return {setting: points}


def _first_order(
    task: Task, group: Sequence[Setting], step: Any, seed: int, options: Any, ledger: Ledger
) -> dict[Setting, list[race.Point]]:
    """The runs of settings of one method, those that are not in the ledger side by side."""
    keys = {s: _identity(task, s, seed, options, task.updates) for s in group}
    found = {s: ledger.find(key) for s, key in keys.items()}
    missing = [s for s, points in found.items() if points is None]
    params = task.start(seed)
    if len(missing) == 1:
        made = grid.first_order_optimizer(missing[0], step, task.updates)
        trained = [_train(task, made, params, seed, options, task.updates)]
    elif missing:
        trained = _side_by_side(task, missing, step, params, seed, options)
    for setting, points in zip(missing, trained if missing else [], strict=True):
        ledger.add(keys[setting], points)
        found[setting] = points
    return {s: points for s, points in found.items() if points is not None}


def _side_by_side(
    task: Task, group: Sequence[Setting], step: Any, params: Any, seed: int, options: Any
) -> list[list[race.Point]]:
    """Many settings in one program; seconds are those of one setting that trains alone."""
    alone = grid.first_order_optimizer(group[0], step, task.updates)
    timed = _train(task, alone, params, seed, options, min(TIMED, task.updates))[-1]
    many = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(group), *a.shape)), params)
    evaluate = jax.jit(lambda p: jax.lax.map(task.evaluate, p))
    together = task._replace(evaluate=evaluate)
    made = grid.all_at_once(group, step, task.updates)
    points = _train(together, made, many, seed, options, task.updates)
    each = timed.seconds / timed.update
    return [
        [race.Point(p.update, each * p.update, p.loss[k]) for p in points]
        for k in range(len(group))
    ]


def _train(
    task: Task, optimizer: Any, params: Any, seed: int, options: Any, updates: int
) -> list[race.Point]:
    batches = race.batches(task.images, task.images, options.batch_size, seed)
    every = max(1, updates // EVALUATIONS)
    points, _ = race.run(optimizer, params, batches, task.evaluate, updates, every, seed)
    lost = math.inf  # what is not a number is worse than any that is
    return [p._replace(loss=_or(p.loss, lost)) for p in points]


def _or(loss: Any, lost: float) -> Any:
    return np.nan_to_num(np.asarray(loss), nan=lost, posinf=lost).tolist()


def _identity(task: Task, setting: Setting, seed: int, options: Any, updates: int) -> dict:
    return {
        "data": task.data, **setting._asdict(), "seed": seed, "updates": updates,
        "layers": options.layers, "batch_size": options.batch_size, "l2": options.l2,
    }  # fmt: skip
