"""``python -m benchmarks alignment``: how near the approximate updates are to Gauss-Newton's own.

Botev et al., appendix G.2: while an autoencoder trains, the directions of KFRA, KFLR and KFAC on a
batch are compared with the exact direction `(G + (γ + η) I)^-1 g`, by the cosine of the angle
between them: layer by layer with the block-diagonal G, and as a whole with the full G. Both exact
directions come from conjugate gradients. The factors are those of the batch alone, without a moving
average, and every direction has the damping γ that the training is at.
"""

from __future__ import annotations

import functools
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
from benchmarks.harness import tasks
from benchmarks.harness.arguments import all_seeds, options, positive_int, some_of, wholes, widths
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.optimizers import SECOND_ORDER, second_order, with_key
from benchmarks.harness.plots import COLORS

SOLVER: dict[str, Any] = {"tolerance": 1e-3, "max_iterations": 150}
# A label, the method, and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kfra": ("kfra", {}),
    "kflr": ("kflr", {}),
    "kfac": ("kfac", {"samples": 1}),
    "kfac, 10 samples": ("kfac", {"samples": 10}),
}
WHOLE = "whole"


class Row(NamedTuple):
    """The cosine between a method's direction and an exact one."""

    trained_by: str
    seed: int
    batch: int
    update: int
    damping: float
    method: str
    inverse: str
    layer: str  # or `WHOLE`
    reference: str  # "block" or "full"
    cosine: float


def main(arguments: Sequence[str]) -> None:
    """Trains, compares on the way, prints the table and writes everything down."""
    parser = options("alignment", __doc__, resumable=True)
    add = parser.add_argument
    add("--data", default="mnist", help="curves, mnist, faces, digits or fashion_mnist (mnist)")
    add("--layers", type=widths, default=(250, 125, 60, 30), help="of the encoder (250,125,60,30)")
    add("--batches", type=widths, default=(250, 500, 1000), help="batch sizes (250,500,1000)")
    by, trained = some_of("optimizer", SECOND_ORDER), "a training for each (kfra,kfac)"
    add("--trained-by", type=by, default=("kfra", "kfac"), help=trained)
    probes = "after these updates (0,5,20,50,100,200)"
    add("--probes", type=wholes, default=(0, 5, 20, 50, 100, 200), help=probes)
    add("--seeds", type=positive_int, default=3, help="of parameters and batches (3)")
    given = parser.parse_args(arguments)
    most, rows = max(given.batches), []
    task = tasks.autoencoder(given.data, given.data_dir, given.layers, most, 1e-5)
    trainings = list(itertools.product(given.trained_by, given.batches, all_seeds(given)))
    training = functools.cache(functools.partial(_Training, task))
    what = {"data": given.data, "layers": given.layers, "probes": given.probes}
    with experiment("alignment", arguments, given, len(trainings)) as run:
        for name, size, seed in trainings:

            def train(name: str = name, size: int = size, seed: int = seed) -> list[Row]:
                return list(training(name, size).rows(given.probes, seed))

            own = {**what, "trained_by": name, "batch": size, "seed": seed}
            rows += [Row(*row) for row in run.measure(own, train)]
            run.tick(f"{name}, batch {size}, seed {seed}")
        said = {"conjugate gradients": SOLVER, "l2": 1e-5}
        tables = [_table(rows, given.batches), _by_layer(rows, most)]
        run.record(_compact(rows), tables, {"alignment": _plot(rows, most, given.data)}, said)


class _Training:
    """Trainings by one method with one batch size; other seeds compile nothing."""

    def __init__(self, task: tasks.Task, name: str, size: int) -> None:
        self.task, self.name, self.size = task, name, size
        first = jnp.asarray(task.images[:size])
        example = task.start(0), (first, first)
        self.optimizer = second_order(name, task.objective, *example, {})
        self.step = jax.jit(self.optimizer.step)
        blocks = kfgn.layers.find_blocks(task.objective, *example)
        self.compare = jax.jit(_comparison(task.objective, blocks))

    def rows(self, probes: Sequence[int], seed: int) -> Iterator[Row]:
        """Trains from one start, and yields the rows of every probe."""
        params, images = self.task.start(seed), self.task.images
        order, state = np.random.default_rng(seed), self.optimizer.init(params)
        for update in range(probes[-1] + 1):
            inputs = jnp.asarray(images[order.permutation(len(images))[: self.size]])
            batch, key = (inputs, inputs), jax.random.fold_in(jax.random.key(seed), update)
            if update in probes:
                damping = optax.tree_utils.tree_get(state, "factor_damping")
                found = jax.device_get(self.compare(params, batch, damping, key))
                for which, cosine in found.items():
                    own = self.name, seed, self.size, update, float(damping)
                    yield Row._make((*own, *which, float(cosine)))
            params, state, _ = self.step(params, state, batch, key)


def _comparison(objective: kfgn.Objective, layers: kfgn.layers.LayerBlocks) -> Callable:
    """All cosines at one point, by (method, inverse, layer or whole, reference)."""

    def compare(params, batch, damping, key):
        gradient = jax.grad(objective)(params, batch)
        block, _ = kfgn.solvers.block_gauss_newton_direction(
            objective, params, batch, gradient, damping, **SOLVER
        )
        product = functools.partial(kfgn.gauss_newton(objective).matvec, with_l2=True)

        def damped(v):
            return jax.tree.map(lambda a, b: a + damping * b, product(params, batch, v), v)

        full = kfgn.solvers.conjugate_gradient(damped, gradient, start=block, **SOLVER).x
        found = {("block-diagonal GN", "exact", WHOLE, "full"): _cosine(block, full)}
        for label, (method, chosen) in METHODS.items():
            _, curvature = with_key(objective, method, **chosen)(params, batch, key)
            for inverse in ("factored", "eigen"):
                scale = kfgn.transforms.scale_by_kronecker(
                    layers, damping + objective.l2, decay=None, inverse=inverse
                )
                direction, _ = scale.update(gradient, scale.init(params), curvature=curvature)
                found[label, inverse, WHOLE, "block"] = _cosine(direction, block)
                found[label, inverse, WHOLE, "full"] = _cosine(direction, full)
                for layer, ours, exact in _by_layers(direction, block):
                    found[label, inverse, layer, "block"] = _cosine(ours, exact)
        return found

    return compare


def _by_layers(direction: Any, exact: Any):
    inner = direction["params"], exact["params"]
    for layer in sorted(inner[0], key=lambda name: int(name.rsplit("_", 1)[1])):
        yield layer, inner[0][layer], inner[1][layer]


def _cosine(a: Any, b: Any) -> jax.Array:
    tree = optax.tree_utils
    return tree.tree_vdot(a, b) / (tree.tree_norm(a) * tree.tree_norm(b))


def _compact(rows: list[Row]) -> list[dict[str, Any]]:
    """A look at a training each: its cosines by method and inverse, reference, layer."""
    found: dict[Any, Any] = {}
    for r in rows:
        look = found.setdefault(
            r[:5], {**dict(zip(Row._fields, r[:5], strict=False)), "cosines": {}}
        )
        of_method = look["cosines"].setdefault(f"{r.method}, {r.inverse}", {})
        of_method.setdefault(r.reference, {})[r.layer] = r.cosine
    return list(found.values())


def _mean(rows: list[Row], *, ranged: bool = False, **wanted: Any) -> str | None:
    """Over the probes and seeds; if `ranged`, with the range of the seeds' means."""
    chosen = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    if not chosen:
        return None
    seeds = [
        np.mean([r.cosine for r in chosen if r.seed == seed]) for seed in {r.seed for r in chosen}
    ]
    spread = f" ({min(seeds):.3f} to {max(seeds):.3f})" if ranged and len(seeds) > 1 else ""
    return f"{np.mean(seeds):.3f}{spread}"


def _table(rows: list[Row], sizes: Sequence[int]) -> Table:
    """Means over the probes and seeds of the whole update's cosines."""
    columns = ["trained by", "batch", "method", "inverse", "with block GN", "with full GN"]
    lines = []
    for name in dict.fromkeys(r.trained_by for r in rows):
        for size in sizes:
            for method, inverse in dict.fromkeys((r.method, r.inverse) for r in rows):
                wanted: dict[str, Any] = {"trained_by": name, "batch": size, "layer": WHOLE}
                wanted |= {"method": method, "inverse": inverse}
                cells = [
                    _mean(rows, ranged=True, reference=reference, **wanted)
                    for reference in ("block", "full")
                ]
                lines.append([name, size, method, inverse, *cells])
    return table("Cosine with the exact direction, mean over training", columns, lines)


def _by_layer(rows: list[Row], size: int) -> Table:
    """Means over the probes, seeds and trainings, for the largest batch and the exact inverse."""
    layers = [r for r in dict.fromkeys(r.layer for r in rows) if r != WHOLE]
    lines = [
        [label, *(_mean(rows, batch=size, method=label, inverse="eigen", layer=layer)
                  for layer in layers)]
        for label in METHODS
    ]  # fmt: skip
    title = f"Cosine with the layer's exact direction, batch {size}, exact damped inverse"
    return table(title, ["method", *layers], lines)


def _plot(rows: list[Row], size: int, data: str) -> Figure:
    """The whole update against both exact ones, for every training and inverse."""
    trainings = list(dict.fromkeys(r.trained_by for r in rows))
    figure = Figure(figsize=(11, 3.6 * len(trainings)), layout="constrained")
    grid = figure.subplots(len(trainings), 2, sharex=True, sharey=True, squeeze=False)
    for line, name in zip(grid, trainings, strict=True):
        for axes, reference in zip(line, ("block", "full"), strict=True):
            for method, inverse in dict.fromkeys((r.method, r.inverse) for r in rows):
                chosen = [
                    r for r in rows
                    if (r.trained_by, r.batch, r.method, r.inverse, r.layer, r.reference)
                    == (name, size, method, inverse, WHOLE, reference)
                ]  # fmt: skip
                updates = sorted({r.update for r in chosen})
                cosines = [np.mean([r.cosine for r in chosen if r.update == u]) for u in updates]
                if chosen:
                    axes.plot(
                        updates, cosines, label=f"{method}, {inverse}", marker=".",
                        linestyle={"factored": "--"}.get(inverse, "-"),
                        color={"kfac, 10 samples": "tab:cyan"}.get(
                            method, COLORS.get(method, "black")
                        ),
                    )  # fmt: skip
            axes.set_title(f"trained by {name}: cosine with the {reference} GN direction")
            axes.set_xlabel("updates")
            axes.grid(True, alpha=0.25)
    grid[0, 0].legend(fontsize="small")
    grid[0, 1].legend(fontsize="small")
    figure.suptitle(f"Autoencoder on {data}, batch {size}: means over seeds")
    return figure
