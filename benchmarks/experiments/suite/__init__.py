"""``python -m benchmarks suite``: kfgn's defaults beside tuned first-order methods on many tasks.

Adam, AdamW and Muon are tried at a grid of rates, constant and decayed by a cosine over the seconds
of the training, for `TRIAL` of a task's seconds each; the setting with the least training loss is
trained for all of them, as are L-BFGS, where every batch is the same, and what
`kfgn.make(method=..., inverse=...)` returns with nothing else set. All start from the same
parameters and see the same batches. Seconds are of updates: compiling, drawing and evaluating do
not count, and what compiling took is recorded. Training losses are of held examples. SOAP and
kfac-jax are not among the methods: neither is a requirement of the benchmarks. A finished training
is kept: `--resume` goes on with the next, unless kfgn or the tasks have changed since.
"""

import functools
import hashlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import benchmarks
import kfgn
from benchmarks.experiments.suite.report import Trained, figures, tables
from benchmarks.experiments.suite.tasks import TASKS, Suited
from benchmarks.harness import interrupt
from benchmarks.harness.arguments import options, positive_number, some_of
from benchmarks.harness.experiment import experiment
from benchmarks.harness.optimizers import with_gradient
from benchmarks.harness.timing import compiled
from kfgn.base.kronecker import INVERSES

NAME = "suite"
TRIAL = 1 / 6  # of the seconds, for every setting of the grid
LOOKS = 20  # at the losses of a training
RATES = (1e-2, 3e-3, 1e-3, 3e-4)
FIRST_ORDER: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
}


class Setting(NamedTuple):
    """A method, and what is set of it."""

    method: str
    rate: float = 1.0  # times which a step is taken: of first-order methods
    cosine: bool = False


def sources(*folders: Path) -> str:
    """A digest of the modules in folders, of kfgn and the benchmarks where none is given."""
    found = hashlib.sha256()
    folders = folders or tuple(Path(str(m.__file__)).parent for m in (kfgn, benchmarks))
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def main(arguments: Sequence[str]) -> None:
    """Trains with every method on every task, and writes tables and figures."""
    parser = options(NAME, __doc__, resumable=True)
    add = parser.add_argument
    add("--scale", type=positive_number, default=1.0, help="times every task's seconds (1)")
    add("--only", type=some_of("task", TASKS), default=tuple(TASKS), help="tasks, with commas")
    add("--inverse", choices=INVERSES, default=INVERSES[0], help="of kfgn's factors (factored)")
    given = parser.parse_args(arguments)
    with experiment(NAME, arguments, given, total=len(given.only)) as run:
        found: dict[str, dict[str, Trained]] = {}
        code = sources()
        for name in given.only:
            trainer = _Trainer(TASKS[name], given.seed, given.data_dir, given.inverse)
            suited = trainer.suited
            what = {"task": name, "seed": given.seed, "code": code}

            def train(
                setting: Setting, seconds: float, trainer: Any = trainer, what: Any = what
            ) -> Trained:
                settings = {**what, **setting._asdict(), "seconds": seconds}
                if setting.method in trainer.suited.methods:
                    settings["inverse"] = given.inverse
                return Trained(*run.measure(settings, lambda: trainer.train(setting, seconds)))

            whole = suited.seconds * given.scale
            own = found[name] = {}
            for method in FIRST_ORDER:
                grid = [Setting(method, *s) for s in itertools.product(RATES, (False, True))]
                best = min(grid, key=lambda s: train(s, whole * TRIAL).end)
                own[method] = train(best, whole)
            for method in (*["L-BFGS"] * suited.deterministic, *suited.methods):
                own[method] = train(Setting(method), whole)
            run.tick(name)
        measured = {name: {k: t._asdict() for k, t in own.items()} for name, own in found.items()}
        run.record(measured, tables(found), figures(found))


class _Trainer:
    """Trains on one task; a method is compiled once."""

    def __init__(
        self, make: Callable[..., Suited], seed: int, folder: Path | None, inverse: str
    ) -> None:
        self._make, self.seed, self._folder, self._inverse = make, seed, folder, inverse
        self._programs: dict[str, Any] = {}

    @functools.cached_property
    def suited(self) -> Suited:
        """The task."""
        return self._make(self.seed, self._folder)

    @functools.cached_property
    def _functions(self) -> tuple[Any, Any, Any]:
        task, test = self.suited.task, self.suited.test
        return jax.jit(task.draw), jax.jit(task.evaluate), test and jax.jit(test)

    def train(self, setting: Setting, seconds: float) -> Trained:
        """So many seconds of updates, unless a loss is not finite."""
        draw, evaluate, test = self._functions
        key, params = jax.random.key(self.seed + 1), self.suited.task.params
        if setting.method not in self._programs:
            self._programs[setting.method] = self._compiled(setting.method, draw(key, params))
        program, state, compiling = self._programs[setting.method]
        points, spent = [(0, 0.0, float(evaluate(params)))], 0.0
        for update in itertools.count(1):
            interrupt.check()
            own = jax.random.fold_in(key, update)
            batch = jax.block_until_ready(draw(own, params))
            decay = 0.5 * (1 + math.cos(math.pi * spent / seconds)) if setting.cosine else 1.0
            rate = np.float32(setting.rate * decay)
            start = time.perf_counter()
            params, state = jax.block_until_ready(program(params, state, batch, own, rate))
            spent += time.perf_counter() - start
            if spent >= seconds * len(points) / LOOKS:
                points.append((update, spent, float(evaluate(params))))
                if spent >= seconds or not np.isfinite(points[-1][2]):
                    break
        tested = None if test is None else float(test(params))
        said = f", {setting.rate:g}{' cosine' if setting.cosine else ''}"
        label = setting.method + (said if setting.method in FIRST_ORDER else "")
        return Trained(label, compiling, points, tested)

    def _compiled(self, method: str, batch: Any) -> tuple[Any, Any, float]:
        """The step, the state it begins with, and what compiling took."""
        task, start = self.suited.task, time.perf_counter()
        if method in self.suited.methods:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", kfgn.errors.CostWarning)  # the table says it
                made = kfgn.make(
                    task.objective, task.params, batch, method=method, inverse=self._inverse
                )
            optimizer, curvature_fn = made

            def step(params: Any, state: Any, batch: Any, key: jax.Array, rate: Any) -> Any:
                del rate
                (_, grads), curvature = curvature_fn(params, batch, key=key)
                updates, state = optimizer.update(grads, state, params, curvature=curvature)
                return optax.apply_updates(params, updates), state

            state = optimizer.init(task.params)
        else:
            transformation = FIRST_ORDER[method](1.0) if method in FIRST_ORDER else optax.lbfgs()
            own = with_gradient(method, task.objective, transformation)

            def step(params: Any, state: Any, batch: Any, key: jax.Array, rate: Any) -> Any:
                after, state, _ = own.step(params, state, batch, key)
                return jax.tree.map(lambda a, b: a + rate * (b - a), params, after), state

            state = own.init(task.params)
        more = batch, jax.random.key(0), np.float32(1)
        making = time.perf_counter() - start
        program, seconds, _ = compiled(step, task.params, state, *more)
        return program, state, making + seconds
