"""``python -m benchmarks curvature``: where curvature is negative while a network trains.

Small classifiers of digits, one for each transfer function, are trained by Adam; at some updates
`kfgn.diagnostics.negative_curvature` looks at every layer (Veitch, appendix C): at the eigenvalues
of its block of the Hessian, and at the second-order terms whose sign eq. (87) asks for. Beside them
stands the least eigenvalue of the whole Hessian. Networks that are piecewise linear have no
such terms, so that with a convex loss their blocks have no negative eigenvalue (Botev et al.,
section 2.2.3), whatever the whole Hessian has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import kfgn
from benchmarks.experiments.curvature.plots import plot_layers, plot_network
from benchmarks.harness import tasks
from benchmarks.harness.arguments import (
    options,
    positive_int,
    positive_number,
    settings,
    some_of,
    widths,
)
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.display import Ticker, table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.optimizers import with_gradient

NAME = "curvature"
TRANSFERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "leaky": lambda x: jnp.maximum(0.1 * x, x),  # as in section 2.2.3
}
PIECEWISE_LINEAR = ("relu", "leaky")
ROUNDING = 1e-12  # a negative eigenvalue of float64, beside the greatest of its matrix


class Look(NamedTuple):
    """What was seen of a network at one update."""

    update: int
    loss: float
    accuracy: float
    gradient_norm: float
    least: float  # eigenvalue of the whole Hessian
    greatest: float
    negative: int  # how many of its eigenvalues are negative
    trace: float
    layers: dict[str, dict[str, float]]  # what `_of_layer` gathers


def main(arguments: Sequence[str]) -> None:
    """Trains all networks, and writes the table and the figures."""
    given = _parse(arguments)
    data = tasks.images("digits", given.data_dir, max(given.batch_size, given.examples))
    at, found = looks(given.updates, given.looks), {}
    total = len(at) * len(given.transfers)
    with experiment(NAME, arguments, given) as run:
        with jax.enable_x64(True), run.progress(NAME, total) as ticker:
            for name in given.transfers:
                what = {**settings(given), "transfers": name}
                if run.find(what) is not None:  # nothing of it will tick
                    ticker.expect(-len(at))
                train = functools.partial(_train, name, data, given, at, ticker)
                found[name] = [Look(*look) for look in run.measure(what, train)]
        measured = {name: [look._asdict() for look in seen] for name, seen in found.items()}
        figures = {"layers": plot_layers(found), "network": plot_network(found)}
        run.record(measured, [_layer_table(found), _network_table(found)], figures)


def _parse(arguments: Sequence[str]) -> Any:
    parser = options(NAME, __doc__, resumable=True)
    add = parser.add_argument
    every = some_of("transfer", TRANSFERS)
    add("--transfers", type=every, default=tuple(TRANSFERS), help=f"of {','.join(TRANSFERS)} (all)")
    add("--layers", type=widths, default=(10, 10), help="widths of the hidden layers (10,10)")
    add("--updates", type=positive_int, default=1000, help="of every network (1000)")
    add("--looks", type=positive_int, default=10, help="at the curvature, about so many (10)")
    add("--batch-size", type=positive_int, default=100, help="images per update (100)")
    add("--examples", type=positive_int, default=200, help="images to look at (200)")
    add("--learning-rate", type=positive_number, default=3e-3, help="Adam's (0.003)")
    return parser.parse_args(arguments)


def looks(updates: int, count: int) -> list[int]:
    """The updates to look at: most of them early, where most changes."""
    spaced = np.geomspace(1, updates, max(count - 1, 1))
    return sorted({0, updates, *(round(x) for x in spaced)})


def _train(name: str, data: Any, given: Any, at: Sequence[int], ticker: Ticker) -> list[Look]:
    params = chain_params((data.train.shape[1], *given.layers, 10), given.seed, dtype=jnp.float64)
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(chain(TRANSFERS[name]), loss)
    train = data.train.astype(np.float64), data.train_labels
    batches = draw_batches(train, given.batch_size, seed=given.seed)
    adam = with_gradient("adam", objective, optax.adam(given.learning_rate))
    state, step, look, seen = adam.init(params), jax.jit(adam.step), _looker(objective), []
    shown = jax.tree.map(lambda a: a[: given.examples], train)
    for update in range(given.updates + 1):
        if update in at:
            found = jax.device_get(look(params, shown))
            seen.append(_gathered(update, found))
            ticker.step(f"{name}, update {update}, loss {seen[-1].loss:.3f}")
        params, state, _ = step(params, state, next(batches)[0], jax.random.key(0))
    return seen


def _looker(objective: kfgn.Objective) -> Callable[[Any, Any], dict[str, Any]]:
    whole = kfgn.hessian(objective).dense

    @jax.jit
    def look(params, batch):
        value, gradient = jax.value_and_grad(objective)(params, batch)
        return {
            "loss": value,
            "accuracy": jnp.mean(jnp.argmax(objective.model(params, batch[0]), 1) == batch[1]),
            "gradient_norm": optax.tree.norm(gradient),
            "eigenvalues": jnp.linalg.eigvalsh(whole(params, batch)),
            "units": kfgn.diagnostics.negative_curvature(objective)(params, batch),
            "blocks": kfgn.diagnostics.negative_curvature(
                objective, of="block", tolerance=ROUNDING
            )(params, batch),
        }

    return look


def _gathered(update: int, found: dict[str, Any]) -> Look:
    eigenvalues = found["eigenvalues"]
    least, greatest = float(eigenvalues[0]), float(eigenvalues[-1])
    negative = int(np.sum(eigenvalues < -ROUNDING * np.max(np.abs(eigenvalues))))
    blocks, units = found["blocks"], found["units"]
    return Look(
        update,
        float(found["loss"]),
        float(found["accuracy"]),
        float(found["gradient_norm"]),
        least,
        greatest,
        negative,
        float(np.sum(eigenvalues)),
        {name: _of_layer(blocks[name], units[name]) for name in blocks},
    )


def _of_layer(block: Any, unit: Any) -> dict[str, float]:
    """The mean block of the layer's parameters, and every example's matrix in its units."""
    found = {
        "least": block.least,
        "greatest": block.greatest,
        "negative_share": block.negative_share,
        "beyond_gauss_newton": block.second_order_norm / block.gauss_newton_norm,
        "unit_least": unit.least,
        "unit_negative_share": unit.negative_share,
        "term_negative_share": unit.term_negative_share,
        "term_positive_share": unit.term_positive_share,
        "term_trace": unit.term_trace,
        "term_norm": unit.term_norm,
        "unit_gauss_newton_norm": unit.gauss_newton_norm,
    }
    return {name: float(value) for name, value in found.items()}


def _layer_table(found: dict[str, list[Look]]) -> Table:
    columns = (
        "network", "layer", "least eigenvalue", "of the greatest", "negative", "H-G / G",
        "(87) < 0", "(87) > 0", "first sum", "last sum",
    )  # fmt: skip
    rows = []
    for name, layer, seen in _layers(found):
        lowest = min(seen, key=lambda s: s["least"] / s["greatest"])
        rows.append([
            name, layer.removeprefix("layer "), f"{lowest['least']:.2g}",
            f"{lowest['least'] / lowest['greatest']:.2g}",
            f"{max(s['negative_share'] for s in seen):.0%}",
            f"{max(s['beyond_gauss_newton'] for s in seen):.2g}",
            f"{np.mean([s['term_negative_share'] for s in seen]):.0%}",
            f"{np.mean([s['term_positive_share'] for s in seen]):.0%}",
            f"{seen[0]['term_trace']:.2g}", f"{seen[-1]['term_trace']:.2g}",
        ])  # fmt: skip
    title = "every layer's block: the worst of all updates; and its second-order terms, eq. (87)"
    return table(title, columns, rows)


def _layers(found: dict[str, list[Look]]) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    for name, looks_at in found.items():
        for layer in looks_at[0].layers:
            yield name, layer, [look.layers[layer] for look in looks_at]


def _network_table(found: dict[str, list[Look]]) -> Table:
    columns = (
        "network", "update", "loss", "accuracy", "|gradient|", "least eigenvalue", "greatest",
        "negative", "trace",
    )  # fmt: skip
    rows = [
        [
            name, look.update, f"{look.loss:.4f}", f"{look.accuracy:.2f}",
            f"{look.gradient_norm:.2g}", f"{look.least:.2g}", f"{look.greatest:.2g}",
            look.negative, f"{look.trace:.2g}",
        ]
        for name, seen in found.items()
        for look in (seen[0], seen[len(seen) // 2], seen[-1])
    ]  # fmt: skip
    return table("the whole Hessian, first, halfway and last", columns, rows)
