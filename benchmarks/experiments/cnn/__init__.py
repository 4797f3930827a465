"""``python -m benchmarks cnn``: subsampled Newton-CG on a convolutional network.

The setting is that of the lecture on Newton methods for CNN: f(θ) = |θ|² / 2C + the mean loss of
l images, with C = 0.01 l and the squared or the cross-entropy loss; the gradient of all l images
and the Gauss-Newton matrix of a few of them; conjugate gradients, backtracking and damping as
there. Every method has the same seconds from the same start; compiling and evaluating do not
count. Each first-order step size of a small grid is tried for some seconds, and the one with the
least f gets a full run from the start; if it is lost on the way, the next best gets one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from benchmarks import BenchmarkError
from benchmarks.datasets import NAMES, load
from benchmarks.experiments.cnn.lecture import (
    CLASSES,
    LOSSES,
    METHODS,
    RATES,
    Method,
    Network,
    evaluator,
    methods,
    problem,
)
from benchmarks.experiments.cnn.plots import plot_part
from benchmarks.harness.arguments import (
    options,
    positive_int,
    positive_number,
    settings,
    some_of,
    up_to,
    widths,
)
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.display import figure, table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.race import timed_steps

NAME = "cnn"
Row = dict[str, float | None]


class Part(NamedTuple):
    """One data set under one loss, ready for any method."""

    data: str
    loss: str
    start: Any  # parameters
    train: Any  # (images, targets)
    test: Any  # (images, labels)
    evaluate: Any  # (params, train, test) -> figures
    first: Row  # the figures at the start


def main(arguments: Sequence[str]) -> None:
    """Runs every method on every data set under every loss; writes after each run."""
    given = _parse(arguments)
    images = {name: _images(name, given) for name in given.data}
    network = Network(given.channels)
    said = {"c": given.c_factor * given.images, "rates": RATES}
    runs: list[dict[str, Any]] = []
    tables: list[Table] = []
    figures: dict[str, Any] = {}
    with experiment(NAME, arguments, given) as experimenting:
        for part, made in _parts(given, images, network):
            own: list[dict[str, Any]] = []
            with experimenting.progress(f"{part.data}, {part.loss}", len(made)) as ticker:
                for method in made:
                    what = {**_determining(given), "part": part[:2], "method": method.name}
                    run = functools.partial(_run, method, part, given)
                    own.append(experimenting.measure(what, run))
                    ticker.step(f"{own[-1]['method']}  {_figures(own[-1]['curve'][-1])}")
                    now = [*tables, _table(part, own)]
                    experimenting.record(runs + own, now, figures, said, quiet=True)
            runs += own
            tables.append(_table(part, own))
            experimenting.console.print(tables[-1])
            title = f"{part.data}, {part.loss} loss"
            figures[f"{part.data}-{part.loss}"] = plot_part(title, own)
        experimenting.record(runs, tables, figures, said, quiet=True)
        experimenting.console.print(f"written to {given.out}")


def _parts(given: Any, images: Any, network: Network) -> Iterator[tuple[Part, list[Method]]]:
    """Every loss with every data set, and the methods for it."""
    for loss in given.losses:
        task = problem(loss, network, given.c_factor * given.images)
        evaluate = evaluator(task)
        made: dict[Any, list[Method]] = {}  # by image size: sets of one size share programs
        for name in given.data:
            train, test = images[name]
            start = network.init(jax.random.key(given.seed), train[0][:1])
            data = train[0], task.targets(train[1])
            part = Part(name, loss, start, data, test, evaluate, {})
            part = part._replace(first=_row(part, start, 0, 0.0))
            sizes = given.batch_size, given.kronecker_batch_size
            if (size := train[0].shape[1:]) not in made:
                made[size] = methods(given.methods, task, start, data, given.percent, sizes)
            yield part, made[size]


def _determining(given: Any) -> dict[str, Any]:
    """The options that a run depends on: all but those that say which runs there are."""
    return {k: v for k, v in settings(given).items() if k not in ("data", "losses", "methods")}


def _parse(arguments: Sequence[str]) -> Any:
    parser = options(NAME, __doc__, resumable=True)
    add = parser.add_argument
    data, losses = some_of("data set", NAMES), some_of("loss", LOSSES)
    chosen = some_of("method", METHODS)
    add("--data", type=data, default=("mnist", "fashion_mnist"), help="(mnist,fashion_mnist)")
    add("--losses", type=losses, default=LOSSES, help=f"({','.join(LOSSES)})")
    add("--methods", type=chosen, default=METHODS, help=f"({','.join(METHODS)})")
    add("--images", type=positive_int, default=5000, help="l, to train on (5000)")
    add("--seconds", type=positive_number, default=10.0, help="of training for every method (10)")
    add("--trial-seconds", type=positive_number, default=1.0, help="for a step size (1)")
    add("--iterations", type=positive_int, default=10**9, help="end after so many in any case")
    add("--evaluations", type=positive_int, default=6, help="during a run, at most (6)")
    every = "of the images that the Gauss-Newton matrix is of, a run for each (1,5,10)"
    add("--percent", type=up_to(100), default=(1.0, 5.0, 10.0), help=every)
    add("--batch-size", type=positive_int, default=128, help="of first-order methods (128)")
    add("--kronecker-batch-size", type=positive_int, default=500, help="of KFLR, KFRA (500)")
    add("--channels", type=widths, default=(4, 8, 8), help="of the convolutions (4,8,8)")
    add("--c-factor", type=positive_number, default=0.01, help="C / l (0.01)")
    given = parser.parse_args(arguments)
    if len(given.channels) != 3:
        raise BenchmarkError("--channels takes three numbers, one for each convolution")
    return given


def _images(name: str, given: Any) -> tuple[Any, Any]:
    """`(images, labels)` for training and for testing, in [0, 1] less the mean training image."""
    data = load(name, data_dir=given.data_dir)
    if data.train_labels is None or data.test_labels is None:
        raise BenchmarkError(f"the data set {name!r} has no labels to classify by")
    if max(data.train_labels.max(), data.test_labels.max()) >= CLASSES:
        raise BenchmarkError(f"the data set {name!r} has more than {CLASSES} classes")
    if given.images > len(data.train):
        raise BenchmarkError(f"{name} has {len(data.train)} training images, not {given.images}")
    shape = (-1, *data.image_shape, 1)
    train, test = data.train[: given.images].reshape(shape), data.test.reshape(shape)
    mean = train.mean(axis=0)
    return (train - mean, data.train_labels[: given.images]), (test - mean, data.test_labels)


def _run(method: Method, part: Part, given: Any) -> dict[str, Any]:
    """A method's full run at the step size whose trial ended with the least f.

    Where that step size is lost in the longer run, the next best gets one.
    """
    trials: list[dict[str, Any]] = []
    for rate in method.rates if len(method.rates) > 1 else ():
        trial = _train(method, part, given, rate, given.trial_seconds, evaluations=1)
        trials.append({"rate": rate, **trial["curve"][-1]})
    ranked = sorted(trials, key=lambda t: _or_infinite(t["objective"]))
    run, lost = {}, []
    for rate in [trial["rate"] for trial in ranked] or [None]:
        run = _train(method, part, given, rate, given.seconds, given.evaluations)
        run["method"] = method.name if rate is None else f"{method.name} {rate:g}"
        if not _is_lost(run["curve"]):
            break
        lost.append(rate)
    return {"data": part.data, "loss": part.loss, **run, "trials": trials, "lost": lost}


def _is_lost(curve: Sequence[Row]) -> bool:
    """Whether a run ended no lower than it began."""
    return _or_infinite(curve[-1]["objective"]) >= _or_infinite(curve[0]["objective"])


def _train(
    method: Method, part: Part, given: Any, rate: float | None, seconds: float, evaluations: int
) -> dict[str, Any]:
    """Trains for so many seconds, and evaluates at equal distances of them."""
    rate_argument = np.float32(rate or 0)
    example = tuple(a[: method.batch_size] for a in part.train)
    state = method.init(part.start)
    program, compile_seconds = method.program(part.start, state, example, rate_argument)

    def step(params, state, batch, key):
        del key
        return *program(params, state, batch, rate_argument), None

    drawn = (batch for batch, _ in draw_batches(part.train, method.batch_size, seed=given.seed))
    curve, due = [part.first], seconds / evaluations
    steps: list[dict[str, float]] = []
    for at in timed_steps(step, part.start, state, drawn, 0, given.iterations, seconds):
        steps.append(method.inside(at.state))
        if at.seconds >= due or at.update == given.iterations:
            curve.append(_row(part, at.params, at.update, at.seconds))
            due = (math.floor(at.seconds / seconds * evaluations) + 1) * seconds / evaluations
    inside = {k: [step[k] for step in steps] for k in steps[0]}
    return {"compile_seconds": round(compile_seconds, 2), "curve": curve, "inside": inside}


def _row(part: Part, params: Any, iteration: int, seconds: float) -> Row:
    figures = part.evaluate(params, part.train, part.test)
    kept = {k: v if math.isfinite(v) else None for k, v in figures.items()}  # JSON knows no NaN
    return {"iteration": iteration, "seconds": round(seconds, 4), **kept}


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _figures(row: Row) -> str:
    return f"f {_shown(row['objective'], '.4f')}, accuracy {_shown(row['accuracy'], '.2%')}"


def _shown(value: float | None, form: str) -> str:
    return figure(value, form) or "not finite"


def _table(part: Part, runs: Sequence[dict[str, Any]]) -> Table:
    """The ends of the runs; "CG" is the mean number of iterations of conjugate gradients."""
    rows = []
    for run in runs:
        last, inside = run["curve"][-1], run["inside"]
        rows.append([
            run["method"], last["iteration"], f"{last['seconds']:.1f}",
            f"{1e3 * last['seconds'] / last['iteration']:.0f}", f"{run['compile_seconds']:.1f}",
            _shown(last["objective"], ".4f"), _shown(last["loss"], ".4f"),
            _shown(100 * last["accuracy"], ".2f"),
            f"{np.mean(inside['cg']):.0f}" if inside else None,
            f"{inside['damping'][-1]:.2g}" if inside else None,
        ])  # fmt: skip
    columns = ("method", "iterations", "s", "ms each", "compile s", "f", "train loss",
               "test %", "CG", "λ")  # fmt: skip
    return table(f"{part.data}, {part.loss} loss, {len(part.train[1])} images", columns, rows)
