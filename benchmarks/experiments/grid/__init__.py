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

from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import BenchmarkError
from benchmarks.datasets import NAMES
from benchmarks.experiments.grid.report import Runs, best_of_adam, claims_table, losses_table, plot
from benchmarks.experiments.grid.settings import (
    ADAM_DEFAULT,
    Setting,
    first_order_settings,
    second_order_settings,
)
from benchmarks.experiments.grid.trainer import Trainer
from benchmarks.harness import race, tasks
from benchmarks.harness.arguments import (
    all_seeds,
    number,
    options,
    positive_int,
    some_of,
    up_to,
    widths,
)
from benchmarks.harness.experiment import Experiment, experiment
from benchmarks.harness.models import ENCODER
from benchmarks.harness.optimizers import FIRST_ORDER

SECOND_ORDER = ("kfra", "kfac")
FULL = {
    "layers": ENCODER, "updates": 40_000, "second_order_updates": 5_000, "stride": 1,
    "periods": (1.0, 0.5, 0.25, 0.125, 0.0625),
}  # fmt: skip
FULL_FACES = 4  # times as many updates on FACES


def main(arguments: Sequence[str]) -> None:
    """Trains all of the grid on every data set; writes the results after each."""
    given = _parse(arguments)
    measured, tables, figures = {}, [], {}
    with experiment("grid", arguments, given) as run:
        trainers = {name: _trainer(name, given, run) for name in given.data}
        for name, trainer in trainers.items():
            runs = _run_all(trainer, given, run)
            measured[name] = [
                {**setting._asdict(), "label": setting.label, "seed": seed, "points": points}
                for setting, seeds in runs.items()
                for seed, points in seeds.items()
            ]
            tables += [losses_table(name, runs), claims_table(name, runs)]
            figures[name] = plot(name, runs)
            run.record(measured, tables, figures, quiet=name != given.data[-1])


def _parse(arguments: Sequence[str]) -> Any:
    parser = options("grid", __doc__, resumable=True)
    add = parser.add_argument
    data, methods = some_of("data set", NAMES), some_of("method", FIRST_ORDER)
    add("--data", type=data, default=("curves", "mnist", "faces"), help="(curves,mnist,faces)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="(250,125,60,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--updates", type=positive_int, default=1200, help="of first-order methods (1200)")
    add("--second-order-updates", type=positive_int, default=240, help="(240)")
    add("--methods", type=methods, default=tuple(FIRST_ORDER), help=f"({','.join(FIRST_ORDER)})")
    add("--exponents", type=widths, default=tuple(range(6, 14)), help="k of rates 2^-k (6,...,13)")
    periods = "parts of the updates after which rates halve (1,0.25,0.0625)"
    add("--periods", type=up_to(1), default=(1.0, 0.25, 0.0625), help=periods)
    add(
        "--stride", type=positive_int, default=2, help="others than Adam have every so manieth rate"
    )
    add("--seeds", type=positive_int, default=2, help="of second order and the best Adam (2)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    together = "settings that train at once (1 on a CPU, all of a method elsewhere)"
    add("--together", type=positive_int, help=together)
    add("--full", action="store_true", help="the paper's network, grid and updates")
    given = parser.parse_args(arguments)
    if "adam" not in given.methods:
        raise BenchmarkError("--methods needs adam, to compare with")
    if given.full:
        vars(given).update(FULL)
    if given.together is None:
        given.together = 1 if jax.default_backend() == "cpu" else 1000
    return given


def _trainer(name: str, given: Any, run: Experiment) -> Trainer:
    task = tasks.autoencoder(name, given.data_dir, given.layers, given.batch_size, given.l2)
    longer = FULL_FACES if given.full and name == "faces" else 1
    identity = {key: getattr(given, key) for key in ("layers", "batch_size", "l2")}
    return Trainer(task, longer * given.updates, longer * given.second_order_updates, run, identity)


def _run_all(trainer: Trainer, given: Any, run: Experiment) -> Runs:
    """Every setting once, and second order and Adam's best and default for the other seeds."""
    first = first_order_settings(given.methods, given.exponents, given.periods, given.stride)
    second = second_order_settings(SECOND_ORDER)
    one, *others = all_seeds(given)
    total = len(first) + (1 + len(others)) * len(second) + 2 * len(others)
    runs: Runs = {}
    with run.progress(trainer.task.dataset.name, total) as ticker:

        def keep(found: dict[Setting, list[race.Point]], seed: int) -> None:
            for setting, points in found.items():
                runs.setdefault(setting, {})[seed] = points
                ticker.step(f"{setting.label}: {points[-1].loss:.2f}")

        for setting in second:
            for seed in (one, *others):
                keep(trainer.second_order(setting, seed), seed)
        for method in given.methods:
            own = [setting for setting in first if setting.method == method]
            for at in range(0, len(own), given.together):
                keep(trainer.first_order(own[at : at + given.together], one), one)
        for setting in (best_of_adam(runs)[0], Setting("adam", ADAM_DEFAULT, 1.0)):
            for seed in others:
                keep(trainer.first_order([setting], seed), seed)
    return runs
