"""``python -m benchmarks mixture``: a mixture of two classifiers, which is no exponential family.

Botev et al., section 5.2: MNIST's digits are told odd from even by 784-1000-500-250-30-3 and the
likelihood of eq. (27). Its Hessian at the outputs depends on the target and is not positive
semi-definite everywhere; Gauss-Newton quantities use, for every example, the nearest positive
semi-definite matrix (negative eigenvalues set to zero), KFAC samples targets from the model.
Second order runs with kfgn's defaults, with the paper's preset, whose average of the parameters is
what is evaluated (appendix C.4), and as a preconditioner alone: at fixed damping, with a rate that
decays, without the quadratic model of one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness import race, tasks
from benchmarks.harness.arguments import (
    all_seeds,
    number,
    one_of,
    options,
    positive_int,
    some_of,
    up_to,
    widths,
)
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.optimizers import Optimizer, first_order, second_order, with_curvature
from benchmarks.harness.plots import COLORS, against, curve

EXPONENTS = (7, 8, 9, 10, 11, 12)  # k of Adam's rates 2^-k
PERIODS = (1.0, 0.25)  # the rate halves after so much of the updates; 1 leaves it as it is
SECOND_ORDER = ("kfra", "kflr", "kfac")
# The paper's has no momentum, and averages parameters; for the last, see `_fixed`.
PRESETS = ("default", "paper", "fixed")
EVALUATIONS = 40  # of every training
GOALS = (0.1, 0.01, 1e-4)  # losses
INDEFINITE = "examples with an indefinite output Hessian"


def log_likelihoods(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """`log p(y | h)` of eq. (27) for `h` `[3]` and y 0 or 1, without leaving the log scale."""
    weight, *parts = outputs
    sign = 2 * target - 1
    first = jax.nn.log_sigmoid(weight) + jax.nn.log_sigmoid(sign * parts[0])
    second = jax.nn.log_sigmoid(-weight) + jax.nn.log_sigmoid(sign * parts[1])
    return jnp.logaddexp(first, second)


def _loss(outputs, target):
    return -log_likelihoods(outputs, target)


def _sample(key, outputs):
    probability = jnp.exp(log_likelihoods(outputs, jnp.ones((), outputs.dtype)))
    return jax.random.bernoulli(key, probability).astype(outputs.dtype)


MIXTURE = kfgn.losses.from_function(_loss, sample=_sample)


def main(arguments: Sequence[str]) -> None:
    """Trains all optimizers, prints the table and writes everything down."""
    given = _parse(arguments)
    trainer = _Trainer(given)
    first, *others = all_seeds(given)
    second = len(given.methods) * len(given.presets)
    total = len(trainer.contestants) + len(others) * (second + 1)
    runs: dict[str, list[Run]] = {}
    with experiment("mixture", arguments, given, total) as run:

        def train(name: str, seed: int) -> None:
            what = {**trainer.identity, "name": name, "seed": seed}
            found = run.measure(what, functools.partial(trainer.run, name, seed))
            runs.setdefault(name, []).append(Run(race.points(found[0]), found[1]))
            run.tick(f"{name}: {runs[name][-1].end:.2e}")

        for name in trainer.contestants:
            for seed in (first,) if name.startswith("adam") else (first, *others):
                train(name, seed)
        for seed in others:
            train(_best_adam(runs), seed)
        said = {f"{INDEFINITE} at the start": trainer.indefinite(trainer.start(first))}
        measured = {name: [run._asdict() for run in found] for name, found in runs.items()}
        run.record(measured, _tables(runs), {"losses": _plot(runs)}, said)


def _parse(arguments: Sequence[str]) -> Any:
    parser = options("mixture", __doc__, resumable=True)
    add = parser.add_argument
    known = one_of("data set of digits", ("mnist", "digits"))
    add("--data", type=known, default="mnist", help="mnist or digits (mnist)")
    add("--layers", type=widths, default=(1000, 500, 250, 30), help="(1000,500,250,30)")
    add("--updates", type=positive_int, default=200, help="of the second-order methods (200)")
    add("--adam-updates", type=positive_int, default=800, help="(800)")
    add("--exponents", type=widths, default=EXPONENTS, help="k of Adam's rates 2^-k (7,...,12)")
    periods = "parts of its updates to halve after (1,0.25)"
    add("--periods", type=up_to(1), default=PERIODS, help=periods)
    methods, presets = some_of("method", SECOND_ORDER), some_of("preset", PRESETS)
    add("--methods", type=methods, default=SECOND_ORDER, help="of second order (kfra,kflr,kfac)")
    add("--presets", type=presets, default=PRESETS, help="of theirs (default,paper,fixed)")
    add("--seeds", type=positive_int, default=2, help="of second order and the best Adam (2)")
    add("--batch-size", type=positive_int, default=1000, help="(1000)")
    add("--l2", type=number, default=1e-5, help="weight of the penalty (1e-5)")
    return parser.parse_args(arguments)


class Run(NamedTuple):
    """One training."""

    points: list[race.Point]
    indefinite_at_end: float  # the part of examples with an indefinite output Hessian

    @property
    def end(self) -> float:
        """The last loss, infinite where it is not a number."""
        return self.points[-1].loss if np.isfinite(self.points[-1].loss) else np.inf


class _Trainer:
    """The contestants, and what they train on."""

    def __init__(self, given: Any) -> None:
        found = tasks.images(given.data, given.data_dir, given.batch_size)
        assert found.train_labels is not None
        self.data = found.train, (found.train_labels % 2).astype(np.float32)  # even or odd
        self.batch_size = given.batch_size
        sizes = found.train.shape[1], *given.layers, 3
        # A linear code layer, as in the autoencoders' encoder.
        model = chain(linear=(len(given.layers),))
        self.start = functools.cache(functools.partial(chain_params, sizes))
        inputs, targets = (jnp.asarray(a[: tasks.EVALUATED]) for a in self.data)
        held = inputs, targets
        objective = kfgn.Objective(model, MIXTURE, l2=given.l2)
        self.evaluate = jax.jit(lambda params: objective.mean_loss(params, held))
        self._indefinite = jax.jit(lambda params: _indefinite(model(params, inputs), targets))
        self.contestants = _contestants(objective, self.start(given.seed), held, given)
        own = "data", "layers", "updates", "adam_updates", "batch_size", "l2"
        self.identity = {key: getattr(given, key) for key in own}

    def run(self, name: str, seed: int) -> Run:
        """Trains one of them from one start."""
        optimizer, updates = self.contestants[name]
        batches = race.batches(*self.data, self.batch_size, seed)
        every = max(1, updates // EVALUATIONS)
        points, params = race.run(
            optimizer, self.start(seed), batches, self.evaluate, updates, every, seed
        )
        return Run(points, self.indefinite(params))

    def indefinite(self, params: Any) -> float:
        """The part of examples whose output Hessian has a negative eigenvalue."""
        return float(self._indefinite(params))


def _contestants(objective: Any, params: Any, batch: Any, given: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for preset in given.presets:
        for name in given.methods:
            label = name if preset == "default" else f"{name}, {preset}"
            if preset == "fixed":
                made = _fixed(name, objective, params, batch, given.updates)
            else:
                settings = kfgn.transforms.PRESETS.get(preset, {})
                made = second_order(name, objective, params, batch, settings)
            found[label] = made, given.updates
    for exponent in given.exponents:
        for part in given.periods:
            period = None if part == 1 else max(1, int(part * given.adam_updates))
            name = f"adam 2^-{exponent}" + ("" if part == 1 else f", halved each {part:g}")
            adam = first_order("adam", objective, 2.0**-exponent, period)
            found[name] = adam, given.adam_updates
    return found


def _fixed(name: str, objective: Any, params: Any, batch: Any, updates: int) -> Optimizer:
    """Fixed damping, heavy-ball momentum, and a rate that goes to zero: no quadratic model."""
    blocks = kfgn.layers.find_blocks(objective, params, batch)
    made = optax.chain(
        kfgn.transforms.scale_by_kronecker(
            blocks, damping=0.01, decay=0.95, refresh_inverse_every=5
        ),
        optax.trace(0.9),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.03, updates)),
    )
    return with_curvature(name, objective, made)


def _indefinite(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The part of examples whose output Hessian has a negative eigenvalue, beyond roundoff."""
    values = jnp.linalg.eigvalsh(jax.vmap(MIXTURE.hessian)(outputs, targets))
    return jnp.mean(values[:, 0] < -1e-5 * jnp.max(jnp.abs(values), axis=1))


def _best_adam(runs: dict[str, list[Run]]) -> str:
    """By the first seed's last loss."""
    return min((found[0].end, name) for name, found in runs.items() if name.startswith("adam"))[1]


def _tables(runs: dict[str, list[Run]]) -> list[Table]:
    """The losses, and how soon some were reached."""
    best, losses, goals = _best_adam(runs), [], []
    for name, (run, *others) in runs.items():
        label = f"{name} (best of Adam)" if name == best else name
        last, least = run.points[-1], min(p.loss for p in run.points)
        ends = ", ".join(f"{other.end:.2e}" for other in others) or None
        losses.append([label, last.update, f"{last.seconds:.1f}", f"{last.loss:.2e}",
                       f"{least:.2e}", ends])  # fmt: skip
        reached = [next((p for p in run.points if p.loss <= goal), None) for goal in GOALS]
        cells = [f"{p.update} ({p.seconds:.1f} s)" if p else None for p in reached]
        goals.append([label, *cells, f"{run.indefinite_at_end:.0%}"])
    title = "Mixture of two classifiers, odd or even: training loss"
    columns = ["optimizer", "updates", "seconds", "loss", "least", "other seeds"]
    reaching = ["optimizer", *(f"to {g:g}" for g in GOALS), "indefinite at the end"]
    return [
        table(title, columns, losses),
        table("Updates and seconds to a loss", reaching, goals),
    ]


def _plot(runs: dict[str, list[Run]]) -> Figure:
    first_adam = next(name for name in runs if name.startswith("adam"))
    curves = []
    for name, (run, *_) in runs.items():
        adam, preset = name.startswith("adam"), name.partition(", ")[2]
        style: dict[str, Any] = {"color": COLORS[name[:4]], "alpha": 0.4 if adam else 1.0}
        style["linestyle"] = {"paper": "--", "fixed": ":"}.get(preset, "-")
        label = None if adam and name != first_adam else "adam" if adam else name
        curves.append(curve(label, run.points, **style))
    return against(curves)[0]
