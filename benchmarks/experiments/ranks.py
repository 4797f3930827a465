"""``python -m benchmarks ranks``: the rank of the Gauss-Newton matrix of a batch, and its bounds.

Botev et al., appendix E: the rank of a batch's Gauss-Newton matrix is at most N times the rank of
the loss's output Hessian, and that of the sampled Fisher matrix of KFAC at most N S. Section 2.2.3:
units of ReLU that are dead lose rank on the way back, those of a leaky ReLU lose none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.datasets import load
from benchmarks.harness.arguments import options, widths
from benchmarks.harness.display import table
from benchmarks.harness.experiment import Experiment, experiment
from benchmarks.harness.models import chain, chain_params, hidden_values
from benchmarks.harness.optimizers import trained, with_gradient

LOSSES: dict[str, tuple[kfgn.losses.Loss, int, int]] = {  # loss, outputs, rank of its Hessian
    "softmax cross-entropy": (kfgn.losses.softmax_cross_entropy_with_integer_labels, 10, 9),
    "squared error": (kfgn.losses.half_squared_error, 10, 10),
    "sigmoid cross-entropy, odd or even": (kfgn.losses.sigmoid_binary_cross_entropy, 1, 1),
}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky relu, max(0.1 x, x)": lambda x: jnp.maximum(0.1 * x, x),
    "tanh": jnp.tanh,
}


class Row(NamedTuple):
    """The rank of one batch's matrix beside its bound."""

    loss: str
    examples: int
    samples: int  # 0 for Gauss-Newton, else of the Fisher matrix
    rank: int
    bound: int


class Dead(NamedTuple):
    """What dead units leave of the curvature at the first layer."""

    activation: str
    depth: int
    trained: int  # steps of Adam
    units: float  # the part of hidden units that are zero for every example
    first_rank: int  # of the mean pre-activation Gauss-Newton matrix of the first layer
    rank: int  # of the whole Gauss-Newton matrix


def main(arguments: Sequence[str]) -> None:
    """Measures ranks, prints the tables and writes everything down."""
    parser = options("ranks", __doc__, data=False, resumable=True)
    add = parser.add_argument
    add("--layers", type=widths, default=(24, 16), help="hidden widths (24,16)")
    add("--examples", type=widths, default=(1, 2, 5, 10, 25, 50, 100, 200), help="(1,...,200)")
    add("--depths", type=widths, default=(2, 6, 12), help="hidden layers (2,6,12)")
    given = parser.parse_args(arguments)
    with experiment("ranks", arguments, given) as run:
        # Ranks are numerical: singular values beside roundoff, which float64 sets far apart.
        with jax.enable_x64(True):
            rows = _ranks(run, given.layers, given.examples, given.seed)
            dead = _dead(run, given.depths, given.seed)
        measured = {"ranks": [r._asdict() for r in rows], "dead": [d._asdict() for d in dead]}
        run.record(measured, _tables(rows, dead), {"ranks": _plot(rows)}, {"data": "digits"})


def _tables(rows: list[Row], dead: list[Dead]) -> list[Table]:
    return [
        table(
            "Rank of a batch's matrix: Gauss-Newton, bound N rank(H_L); Fisher, bound N S",
            ["loss", "matrix", "examples", "rank", "bound"],
            [[r.loss, f"Fisher, S = {r.samples}" if r.samples else "Gauss-Newton", r.examples,
              r.rank, r.bound] for r in rows],
        ),
        table(
            "Dead units (32 per layer, 64 examples, softmax cross-entropy)",
            ["activation", "depth", "Adam steps", "dead units", "rank, layer 1 of 32", "rank, all"],
            [[d.activation, d.depth, d.trained, f"{d.units:.0%}", d.first_rank, d.rank]
             for d in dead],
        ),
    ]  # fmt: skip


def _network(sizes: Sequence[int], seed: int) -> Any:
    return chain_params(sizes, seed, jax.nn.initializers.he_normal(), jnp.float64)


def _batch(count: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    data = load("digits")
    assert data.train_labels is not None
    images = jnp.asarray(data.train[:count], jnp.float64)
    labels = jnp.asarray(data.train_labels[:count])
    return images, (labels[:, None] % 2).astype(jnp.float64) if outputs == 1 else labels


def _ranks(run: Experiment, hidden: Sequence[int], examples: Sequence[int], seed: int) -> list[Row]:
    rows = []
    with run.progress("ranks", len(LOSSES) * len(examples)) as ticker:
        for name, count in itertools.product(LOSSES, examples):
            found = run.measure(
                {"loss": name, "examples": count, "layers": hidden, "seed": seed},
                functools.partial(_with_examples, name, count, hidden, seed),
            )
            rows += [Row(*row) for row in found]
            ticker.step(f"{name}, {count} examples")
    return rows


def _with_examples(name: str, count: int, hidden: Sequence[int], seed: int) -> list[Row]:
    loss, outputs, output_rank = LOSSES[name]
    params = _network([64, *hidden, outputs], seed)
    objective = kfgn.Objective(chain(), loss)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    inputs, targets = _batch(count, outputs)
    if name == "squared error":
        targets = jax.nn.one_hot(targets, 10, dtype=jnp.float64)
    rank = int(jax.jit(kfgn.gauss_newton(objective).rank)(params, (inputs, targets)))
    rows = [Row(name, count, 0, rank, min(count * output_rank, size))]
    for samples in (1, 3):
        rank = _fisher_rank(objective, params, inputs, samples, seed)
        rows.append(Row(name, count, samples, rank, min(count * samples, size)))
    return rows


def _fisher_rank(objective: Any, params: Any, inputs: jax.Array, samples: int, seed: int) -> int:
    """Of the gradients at targets that the model draws, `[N S, P]`."""

    def gradient(example, key):
        output = objective.model(params, example[None])[0]
        target = jax.lax.stop_gradient(objective.loss.sample(key, output))
        loss = jax.grad(lambda p: objective.loss(objective.model(p, example[None])[0], target))
        return jax.flatten_util.ravel_pytree(loss(params))[0]

    keys = jax.random.split(jax.random.key(seed), (len(inputs), samples))
    each = jax.vmap(jax.vmap(gradient, (None, 0)))
    rows = np.asarray(jax.jit(each)(inputs, keys))
    return int(np.linalg.matrix_rank(rows.reshape(len(inputs) * samples, -1)))


def _dead(run: Experiment, depths: Sequence[int], seed: int) -> list[Dead]:
    found = []
    with run.progress("dead units", 2 * len(ACTIVATIONS) * len(depths)) as ticker:
        for name, depth, steps in itertools.product(ACTIVATIONS, depths, (0, 300)):
            one = run.measure(
                {"activation": name, "depth": depth, "steps": steps, "seed": seed},
                functools.partial(_with_depth, name, depth, steps, seed),
            )
            found.append(Dead(*one))
            ticker.step(f"{name}, depth {depth}")
    return found


def _with_depth(name: str, depth: int, steps: int, seed: int) -> Dead:
    activation = ACTIVATIONS[name]
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(chain(activation), loss)
    batch = _batch(64, 10)
    adam = with_gradient("adam", objective, optax.adam(1e-2))
    params = trained(adam, _network([64] + [32] * depth + [10], seed), lambda k: batch, steps)
    matrix = kfgn.gauss_newton(objective)
    mean = functools.partial(matrix.pre_activation, reduce="mean")
    first = jax.jit(lambda p: mean(p, batch)["layer 1"])(params)
    *hidden, _ = hidden_values(params, batch[0], activation)
    dead = [np.all(np.asarray(x) <= 0, axis=0) & (name == "relu") for x in hidden]
    rank = int(jax.jit(matrix.rank)(params, batch))
    first_rank = int(np.linalg.matrix_rank(np.asarray(first), hermitian=True))
    return Dead(name, depth, steps, float(np.mean(dead)), first_rank, rank)


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(LOSSES)), LOSSES, strict=True):
        for samples, color in ((0, "tab:red"), (1, "tab:blue"), (3, "tab:cyan")):
            chosen = [r for r in rows if r.loss == name and r.samples == samples]
            examples = [r.examples for r in chosen]
            label = f"Fisher, {samples} samples" if samples else "Gauss-Newton"
            axes.plot(examples, [r.rank for r in chosen], "o-", color=color, label=label)
            axes.plot(examples, [r.bound for r in chosen], "k:", linewidth=1)
        label = "examples (dotted: the bounds)"
        axes.set(xscale="log", yscale="log", title=name, xlabel=label)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize="small")
    return figure
