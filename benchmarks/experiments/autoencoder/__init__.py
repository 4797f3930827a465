"""Trains the paper's deep autoencoder with one optimizer, or compares several."""

import contextlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import kfgn
from benchmarks import BenchmarkError
from benchmarks.datasets import DataError, Dataset, load
from benchmarks.experiments.autoencoder.request import Request
from benchmarks.harness import plots
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.display import Progress, table, write_table
from benchmarks.harness.models import ENCODER, Autoencoder, initial_params
from benchmarks.harness.optimizers import (
    SECOND_ORDER,
    Optimizer,
    check_options,
    default_learning_rate,
    evaluated_params,
    first_order,
    second_order,
)
from benchmarks.harness.runs import (
    Metrics,
    Result,
    Row,
    RunFolder,
    check_same,
    check_writable,
    cpu_count,
    environment,
    latest_run,
    new_run,
    read_rows,
    read_settings,
)
from benchmarks.harness.training import (
    Position,
    Problem,
    StopRequest,
    Training,
    compile_step,
    start,
    time_sgd_step,
)

EVALUATED = 10_000  # images at most that a loss is evaluated on
SHOWN = 10  # images in the plot of reconstructions


def load_data(request: Request) -> Dataset:
    """The data set, checked against the request."""
    try:
        dataset = load(request.data, data_dir=request.data_dir)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    if request.batch_size > len(dataset.train):
        raise BenchmarkError(
            f"--batch-size {request.batch_size} is more than the {len(dataset.train)} "
            f"training images of {request.data}"
        )
    return dataset


def make_problem(request: Request, dataset: Dataset, model: Autoencoder) -> Problem:
    """The objective, the data on the device, and the starting point."""
    loss = getattr(kfgn.losses, dataset.loss)
    unregularized = kfgn.Objective(model.apply, loss)
    train = jax.device_put(dataset.train)
    return Problem(
        objective=kfgn.Objective(model.apply, loss, l2=request.l2),
        mean_loss=jax.jit(lambda params, images: unregularized(params, (images, images))),
        train=train,
        evaluated_train=train[:EVALUATED],
        evaluated_test=jax.device_put(dataset.test[:EVALUATED]),
        initial_params=initial_params(model, request.seed),
        batch_size=request.batch_size,
        seed=request.seed,
    )


def make_optimizer(request: Request, problem: Problem, name: str) -> Optimizer:
    """The optimizer of this name, with what the request says about it."""
    if name not in SECOND_ORDER:
        rate = default_learning_rate(name, request.learning_rate)
        return first_order(name, problem.objective, rate, request.decay_period)
    images = problem.train[: request.batch_size]
    given = (name, problem.objective, problem.initial_params, (images, images), request.options)
    if request.options:
        check_options(*given)
    return second_order(*given)


def checkpoint_bytes(problem: Problem, optimizers: Sequence[Optimizer]) -> int:
    """About the room that checkpoints need: each run keeps one while it writes the next."""
    params = problem.initial_params
    total = 0
    for optimizer in optimizers:
        kept = (params, jax.eval_shape(optimizer.init, params))
        total += 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return total + 2**24


class Experiment:
    """The runs of one command: the problem they share, their folder, and what they gave."""

    def __init__(self, request: Request, console: Console) -> None:
        request.check()
        check_writable(request.out)
        self.request, self.console = request, console
        self.dataset = load_data(request)
        self.checksum = zlib.crc32(np.ascontiguousarray(self.dataset.train).data)
        self.model = Autoencoder(self.dataset.train.shape[1], request.layers or ENCODER)
        self.problem = make_problem(request, self.dataset, self.model)
        self.optimizers = [make_optimizer(request, self.problem, n) for n in request.optimizers]
        check_writable(request.out, checkpoint_bytes(self.problem, self.optimizers))
        self.folder = RunFolder(self._find_folder())
        self.results: list[Result] = []
        self.sgd_seconds: float | None = None
        self.stop = StopRequest()

    def _find_folder(self) -> Path:
        name = f"{self.request.data}-{'+'.join(self.request.optimizers)}"
        if not self.request.resume:
            return new_run(self.request.out, name)
        folder = latest_run(self.request.out, name)
        for optimizer in self.request.optimizers:
            stored = folder / optimizer / "settings.json"
            if stored.exists():  # in a comparison, the later ones may not have begun
                check_same(stored, self.request.settings(optimizer, self.checksum))
        return folder

    def train(self) -> bool:
        """Runs one optimizer after the other; returns whether Ctrl-C put an end to it."""
        self.say(f"{self.dataset.description}\nrun folder: {self.folder.path}")
        try:
            with self.stop.listening():
                if not self.request.no_sgd_yardstick:
                    self.sgd_seconds = time_sgd_step(self.problem)
                for optimizer in self.optimizers:
                    if self.stop.made:
                        break
                    # Listed before it is trained: wherever it ends, its rows are to be shown.
                    self.results.append(Result(optimizer.name, "interrupted", [], None))
                    self._train_one(optimizer, self.results[-1])
        except KeyboardInterrupt:
            return True
        return self.stop.made

    def _train_one(self, optimizer: Optimizer, result: Result) -> None:
        name, schedule = optimizer.name, self.request.schedule(optimizer.name)
        position = start(self.problem, optimizer)
        with contextlib.closing(Checkpoints(self.folder, f"{name}/checkpoints")) as checkpoints:
            result.rows = self._restore(name, position, checkpoints)
            record = self._record(name, position.update)
            session = record["sessions"][-1]
            if position.update < schedule.updates:
                self.say(f"{name}: compiling")
                step, session["compile_seconds"] = compile_step(self.problem, optimizer, position)
                self.folder.write_json(f"{name}/settings.json", record)
                training = Training(self.problem, step, schedule, position, self.stop)
                with (
                    Metrics(self.folder, f"{name}/metrics.csv", result.rows) as metrics,
                    Progress(self.console, name, schedule.updates, position.update) as progress,
                ):
                    result.outcome = training.run(metrics, checkpoints, progress)
            else:
                result.outcome = "finished"
        if position.usable():
            result.params = evaluated_params(position.params, position.state)
        if result.outcome == "interrupted":
            self.say("interrupted: the same command with --resume goes on from here")
        session["outcome"] = result.outcome
        self.folder.write_json(f"{name}/settings.json", record)

    def _restore(self, name: str, position: Position, checkpoints: Checkpoints) -> list[Row]:
        """Moves ``position`` to the latest checkpoint; returns the rows measured until then."""
        latest = checkpoints.latest() if self.request.resume else None
        if latest is None:
            return []
        arrays, numbers = checkpoints.restore(position.arrays())
        position.params, position.state = arrays["params"], arrays["state"]
        position.update, position.seconds = latest, numbers["seconds"]
        self.say(f"{name}: continues from update {latest}")
        rows = read_rows(self.folder.path / name / "metrics.csv")
        return [row for row in rows if (row["update"] or 0) <= latest]

    def _record(self, name: str, update: int) -> dict[str, Any]:
        """What settings.json says: the settings, and every session that trained with them."""
        session = {"from_update": update, "sgd_step_seconds": self.sgd_seconds, **environment()}
        stored = self.folder.path / name / "settings.json"
        earlier = read_settings(stored)["sessions"] if update else []
        return {
            "settings": self.request.settings(name, self.checksum),
            "schedule": vars(self.request.schedule(name)),
            "sessions": [*earlier, session],
        }

    def say(self, text: str) -> None:
        """Prints plain text."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def report(self) -> None:
        """Shows and keeps the table and the plots of whatever was measured."""
        results = [result for result in self.results if result.rows]
        if not results:
            return
        shown = table(results, self.sgd_seconds)
        self.console.print(shown)
        self.folder.write("table.txt", lambda path: write_table(path, shown))
        curves, problems = plots.references(self.request.data)
        if self.request.references is not None:
            more, unreadable = plots.references(self.request.data, self.request.references)
            if not more and not unreadable:
                self.say(f"no {self.request.data}_*.csv in {self.request.references}")
            curves, problems = curves + more, problems + unreadable
        for problem in problems:
            self.say(problem)
        title = f"Autoencoder on {self.request.data}, {self.request.batch_size} images per update"
        where = f"{jax.devices()[0].device_kind}, {cpu_count()} cores"
        self.folder.write(
            "losses.png",
            lambda path: plots.plot_losses(path, results, title, where, curves, self.sgd_seconds),
        )
        self._plot_reconstructions(results)
        self.say(f"table.txt, losses.png and reconstructions.png are in {self.folder.path}")

    def _plot_reconstructions(self, results: Sequence[Result]) -> None:
        # Spread over the set: neighbors can be the same face, turned a little.
        count = len(self.dataset.test)
        originals = self.dataset.test[np.linspace(0, count - 1, min(SHOWN, count)).astype(int)]
        rows = {}
        for result in results:
            if result.params is not None:
                outputs: Any = self.model.apply(result.params, originals)
                logits = self.dataset.loss == "sigmoid_binary_cross_entropy"
                rows[result.name] = np.asarray(jax.nn.sigmoid(outputs) if logits else outputs)
        self.folder.write(
            "reconstructions.png",
            lambda path: plots.plot_reconstructions(
                path, originals, rows, self.dataset.image_shape
            ),
        )


def run(request: Request) -> tuple[list[str], bool]:
    """Trains and reports; returns what went wrong on the way, and whether it was interrupted."""
    try:
        experiment = Experiment(request, Console())
        try:
            interrupted = experiment.train()
        finally:  # whatever ended the training, what there is of it is shown
            experiment.report()
    except kfgn.errors.KfgnError as error:
        raise BenchmarkError(str(error)) from error
    return experiment.folder.problems, interrupted
