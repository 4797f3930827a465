"""``python -m benchmarks fashion``: Fashion-MNIST classifiers, as Veitch trained them and since.

Networks with one and two hidden layers of 300 are trained by gradient descent, nonlinear conjugate
gradients and L-BFGS-B on the mean over fixed batches of 1000, eq. (28), for 100 iterations (his
tables 3 and 4). KFRA, KFLR, KFAC, Hessian-free with three preconditioners and Adam take those
batches in turn for as many seconds of training as L-BFGS-B took. Then come his three open
questions: why accuracies on training and dev images are so close, what depth does to the methods
where data are few, and what preconditioners are worth.

The paper names neither the hidden units (logistic here, as its σ' > 0 and eq. (16) suggest), nor
the start (LeCun normal), nor gradient descent's rate (two are shown). Its penalty is taken for
λ/2 |θ|^2. Its 60,000 images are 5,000 here, for speed; --images 60000 takes them all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import BenchmarkError
from benchmarks.experiments.fashion import depth as depths
from benchmarks.experiments.fashion.depth import Depth
from benchmarks.experiments.fashion.hessian_free import (
    PRECONDITIONERS,
    conditioned_iterations,
    train_hessian_free,
)
from benchmarks.experiments.fashion.plots import all_figures
from benchmarks.experiments.fashion.tables import all_tables
from benchmarks.experiments.fashion.training import Classifier, Problem, Run, minimize, train
from benchmarks.harness import tasks
from benchmarks.harness.arguments import number, options, positive_int, positive_number, widths
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.experiment import Experiment, experiment
from benchmarks.harness.optimizers import first_order, second_order

NAME = "fashion"
RATES = (0.1, 1.0)  # of gradient descent: the paper names none
ADAM_RATE = 1e-3
KRONECKER = ("KFRA", "KFLR", "KFAC")
FEW = 1000  # images, where the gap between training and dev images is looked into


@dataclass
class Found:
    """What has been measured so far."""

    networks: dict[int, list[Run]] = field(default_factory=dict)  # by hidden layers
    equal_seconds: dict[int, float] = field(default_factory=dict)
    gaps: list[dict[str, Any]] = field(default_factory=list)
    repeated_images: int | None = None  # dev images that are training images too
    conditioned: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # by place
    depths: list[Depth] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "networks": {k: [run.report() for run in runs] for k, runs in self.networks.items()},
            "equal_seconds": self.equal_seconds,
            "gaps": self.gaps,
            "repeated_images": self.repeated_images,
            "conditioned_cg_iterations": self.conditioned,
            "depths": [depth.report() for depth in self.depths],
        }


def main(arguments: Sequence[str]) -> None:
    """Measures everything, and writes it down after every part."""
    given = _parse(arguments)
    data, found = _data(given), Found()
    said = {"gradient_descent_rates": RATES, "adam_rate": ADAM_RATE}
    with experiment(NAME, arguments, given) as run:

        def save(quiet: bool = True) -> None:
            tables, figures = all_tables(found, given), all_figures(found)
            run.record(found.report(), tables, figures, said, quiet)

        save()  # a folder that cannot be written is found before the work
        for _ in _parts(given, data, found, run):
            save()
        save(quiet=False)


def _parse(arguments: Sequence[str]) -> Any:
    parser = options(NAME, __doc__)
    add = parser.add_argument
    add("--images", type=positive_int, default=5000, help="to train on (5000)")
    add("--batch-size", type=positive_int, default=1000, help="images in a batch (1000)")
    add("--iterations", type=positive_int, default=100, help="of the paper's methods (100)")
    add("--seconds", type=positive_number, help="for the others (what L-BFGS-B takes)")
    add("--hidden", type=widths, default=(1, 2), help="numbers of hidden layers (1,2)")
    add("--width", type=positive_int, default=300, help="of hidden layers (300)")
    add("--l2", type=number, default=0.01, help="the paper's λ (0.01)")
    add("--depths", type=widths, default=(2, 4, 8, 12), help="on the digits (2,4,8,12)")
    add("--updates", type=positive_int, default=400, help="on the digits (400)")
    add("--paper-only", action="store_true", help="the paper's own methods, and nothing else")
    return parser.parse_args(arguments)


def _data(given: Any) -> tuple[Sequence[Any], Any]:
    """The fixed batches and the dev images."""
    data = tasks.images("fashion_mnist", given.data_dir, 1)
    count = len(data.train)
    if not given.batch_size <= given.images <= count or given.images % given.batch_size:
        raise BenchmarkError(
            f"--images must be a multiple of --batch-size {given.batch_size} and at most {count}, "
            f"found {given.images}"
        )
    batches = draw_batches(
        (data.train, data.train_labels), given.batch_size, strategy="fixed", seed=given.seed
    )
    chosen = itertools.islice(batches, given.images // given.batch_size)
    return [batch for batch, _ in chosen], (data.test, data.test_labels)


def _parts(given: Any, data: Any, found: Found, run: Experiment) -> Iterator[None]:
    """Yields whenever something more has been measured."""
    batches, dev = data
    for hidden in given.hidden:
        module = Classifier(hidden, given.width)
        problem = Problem(module, given.l2, batches, dev, given.seed)
        yield from _compare(hidden, problem, given, found, run)
        if given.paper_only:
            continue
        lbfgs = _named(found.networks[hidden], "L-BFGS-B")
        places = {
            f"{hidden} hidden, start": problem.params,
            f"{hidden} hidden, end of L-BFGS-B": lbfgs.params,
        }
        found.conditioned |= conditioned_iterations(problem, places)
        yield
    if not given.paper_only:
        yield from _explain_gaps(given, data, found, run)
        jobs = len(given.depths) * len(depths.METHODS)
        with run.progress(f"{NAME}, depth", jobs) as ticker:
            for hidden in given.depths:
                depth = depths.measure(hidden, given.updates, given.seed, ticker.step)
                found.depths.append(depth)
                yield


def _compare(
    hidden: int, problem: Problem, given: Any, found: Found, run: Experiment
) -> Iterator[None]:
    """The paper's methods for so many iterations, and the others for as long as L-BFGS-B took."""
    runs = found.networks.setdefault(hidden, [])
    jobs = _paper_methods(problem, given.iterations)
    others = [] if given.paper_only else list(_other_methods(problem))
    with run.progress(f"{NAME}, {hidden} hidden", len(jobs) + len(others)) as ticker:
        for job in jobs:
            runs.append(job())
            ticker.step(_figures(runs[-1]))
            yield
        seconds = given.seconds or _named(runs, "L-BFGS-B").last.seconds
        found.equal_seconds[hidden] = seconds
        for other in others:
            runs.append(other(seconds))
            ticker.step(_figures(runs[-1]))
            yield


def _paper_methods(problem: Problem, iterations: int) -> list[Callable[[], Run]]:
    def descend(rate: float) -> Run:
        optimizer = first_order("sgd", problem.objective, rate)
        return train(
            problem, optimizer, [problem.train], iterations=iterations, name=f"GD, {rate:g}"
        )

    return [
        *(functools.partial(descend, rate) for rate in RATES),
        lambda: minimize(problem, "NLCG", "cg", iterations),
        lambda: minimize(problem, "L-BFGS-B", "l-bfgs-b", iterations),
    ]


def _other_methods(problem: Problem) -> Iterator[Callable[[float], Run]]:
    """Each takes the seconds it has."""
    objective, params, batch = problem.objective, problem.params, problem.batches[0]

    def fit(name: str, seconds: float) -> Run:
        if name == "Adam":
            method = first_order("adam", objective, ADAM_RATE)
        else:
            method = second_order(name.lower(), objective, params, batch, {})
        return train(problem, method, problem.batches, seconds=seconds, name=name)

    yield from (functools.partial(fit, name) for name in KRONECKER)
    yield from (functools.partial(train_hessian_free, problem, name) for name in PRECONDITIONERS)
    yield functools.partial(fit, "Adam")


def _explain_gaps(given: Any, data: Any, found: Found, run: Experiment) -> Iterator[None]:
    """L-BFGS-B with and without the penalty, on all images and on few: what closes the gap."""
    batches, dev = data
    seen = {image.tobytes() for images, _ in batches for image in np.asarray(images)}
    found.repeated_images = sum(image.tobytes() in seen for image in np.asarray(dev[0]))
    few = max(1, FEW // given.batch_size)
    cases = [(l2, count) for count in (len(batches), few) for l2 in (given.l2, 0.0)]
    cases = list(dict.fromkeys(cases))
    with run.progress(f"{NAME}, gaps", len(cases)) as ticker:
        for l2, count in cases:
            module = Classifier(given.hidden[0], given.width)
            problem = Problem(module, l2, batches[:count], dev, given.seed)
            fit = minimize(problem, "L-BFGS-B", "l-bfgs-b", given.iterations)
            case = {"hidden": given.hidden[0], "l2": l2, "images": len(problem.train[0])}
            found.gaps.append({**case, **fit.report()})
            ticker.step(_figures(fit))
            yield


def _named(runs: Sequence[Run], name: str) -> Run:
    return next(run for run in runs if run.method == name)


def _figures(run: Run) -> str:
    return f"{run.method}: objective {run.last.objective:.4g}, dev {run.last.dev_accuracy:.4f}"
