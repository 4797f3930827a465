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
from rich.console import Console

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
from benchmarks.harness import experiment, race, task
from benchmarks.harness.arguments import names, number, parts, positive_int, widths
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.models import ENCODER
from benchmarks.harness.optimizers import FIRST_ORDER, closest

SECOND_ORDER = ("kfra", "kfac")
FULL = {
    "layers": ENCODER, "updates": 40_000, "second_order_updates": 5_000, "stride": 1,
    "periods": (1.0, 0.5, 0.25, 0.125, 0.0625),
}  # fmt: skip
FULL_FACES = 4  # times as many updates on FACES


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains all of the grid on every data set; writes the results after each."""
    options = _parse(arguments)
    console, said = Console(), experiment.settings(options)
    measured, tables = {}, []
    with experiment.ledger(options) as ledger:
        trainers = {name: _trainer(name, options, ledger) for name in options.data}
        for name, trainer in trainers.items():
            runs = _run_all(trainer, options, console)
            measured[name] = [
                {**setting._asdict(), "label": setting.label, "seed": seed, "points": points}
                for setting, seeds in runs.items()
                for seed, points in seeds.items()
            ]
            tables += [losses_table(name, runs), claims_table(name, runs)]
            shown = console if name == options.data[-1] else Console(quiet=True)
            experiment.record(options.out, "grid", arguments, said, measured, tables, shown)
            plot(options.out / f"{name}.png", name, runs)
    return 0


def _parse(arguments: Sequence[str] | None) -> Any:
    parser = experiment.options("grid", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", type=names, default=("curves", "mnist", "faces"), help="(curves,mnist,faces)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="(250,125,60,30)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--updates", type=positive_int, default=1200, help="of first-order methods (1200)")
    add("--second-order-updates", type=positive_int, default=240, help="(240)")
    add("--methods", type=names, default=tuple(FIRST_ORDER), help=f"({','.join(FIRST_ORDER)})")
    add("--exponents", type=widths, default=tuple(range(6, 14)), help="k of rates 2^-k (6,...,13)")
    periods = "parts of the updates after which rates halve (1,0.25,0.0625)"
    add("--periods", type=parts, default=(1.0, 0.25, 0.0625), help=periods)
    add(
        "--stride", type=positive_int, default=2, help="others than Adam have every so manieth rate"
    )
    add("--seeds", type=positive_int, default=2, help="of second order and the best Adam (2)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    together = "settings that train at once (1 on a CPU, all of a method elsewhere)"
    add("--together", type=positive_int, help=together)
    add("--full", action="store_true", help="the paper's network, grid and updates")
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


def _trainer(name: str, options: Any, ledger: Ledger) -> Trainer:
    found = task.autoencoder(name, options.data_dir, options.layers, options.batch_size, options.l2)
    longer = FULL_FACES if options.full and name == "faces" else 1
    identity = {key: getattr(options, key) for key in ("layers", "batch_size", "l2")}
    updates = longer * options.updates, longer * options.second_order_updates
    return Trainer(found, *updates, ledger, identity)


def _run_all(trainer: Trainer, options: Any, console: Console) -> Runs:
    """Every setting once, and second order and Adam's best and default for the other seeds."""
    first = first_order_settings(
        options.methods, options.exponents, options.periods, options.stride
    )
    second = second_order_settings(SECOND_ORDER)
    one, *others = experiment.all_seeds(options)
    total = len(first) + (1 + len(others)) * len(second) + 2 * len(others)
    runs: Runs = {}
    with experiment.progress(console, trainer.task.data, total) as ticker:

        def keep(found: dict[Setting, list[race.Point]], seed: int) -> None:
            for setting, points in found.items():
                runs.setdefault(setting, {})[seed] = points
                ticker.step(f"{setting.label}: {points[-1].loss:.2f}")

        for setting in second:
            for seed in (one, *others):
                keep(trainer.second_order(setting, seed), seed)
        for method in options.methods:
            own = [setting for setting in first if setting.method == method]
            for at in range(0, len(own), options.together):
                keep(trainer.first_order(own[at : at + options.together], one), one)
        for setting in (best_of_adam(runs)[0], Setting("adam", ADAM_DEFAULT, 1.0)):
            for seed in others:
                keep(trainer.first_order([setting], seed), seed)
    return runs
