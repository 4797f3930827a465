"""``python -m benchmarks speed``: what curvature costs, beside the FLOP floor and an SGD step.

Every figure is a ratio of medians taken in one process: machines are shared, so seconds say
little. The FLOP floor is what the products, factorizations and solves would take at the rate that
this machine reaches in a matrix product of 1000 x 1000, measured in the same run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import RESULTS, one_of, options, positive_int
from benchmarks.harness.display import figure, make_console, table
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.optimizers import second_order
from benchmarks.harness.record import write_rows
from benchmarks.harness.timing import Timed, timed, timed_updates

AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CLASSIFIER = (784, 1000, 500, 250, 10)
BATCH = 1000
MODEL_EXAMPLES = 256  # the default of `kfgn.value_grad_and_curvature`
FRESH = {"refresh_factors_every": 1, "refresh_inverse_every": 1}  # by default 5


class Row(NamedTuple):
    """One measured quantity."""

    name: str
    ratio: float  # to the yardstick
    yardstick: str
    floor: float | None  # the same ratio by FLOPs alone, at the measured product rate
    goal: str
    seconds: float
    compile_seconds: float
    temporary_mib: float


def main(arguments: Sequence[str]) -> None:
    """Measures everything, prints the table and writes it down."""
    groups: dict[str, Callable[[Console, int], list[Row]]] = {
        "autoencoder": autoencoder_rows,
        "classifier": classifier_rows,
        "wide": wide_rows,
    }
    parser = options("speed", __doc__, seeded=False, data=False, out=RESULTS / "speed.json")
    add = parser.add_argument
    add("--blocks", type=positive_int, default=5, help="blocks of 20 updates to time (5)")
    add("--only", type=one_of("group", groups), help=f"one of {', '.join(groups)}")
    add("--trace", help="folder for a trace by jax.profiler, to be read in TensorBoard or Perfetto")
    given, console = parser.parse_args(arguments), make_console()
    rows: list[Row] = []
    with jax.profiler.trace(given.trace) if given.trace else contextlib.nullcontext():
        for name, measure in groups.items():
            if given.only in (None, name):
                rows += measure(console, given.blocks)
    console.print(_table(rows))
    write_rows(given.out, "speed", arguments, rows)
    console.print(f"written to {given.out}")


def autoencoder_rows(console: Console, blocks: int) -> list[Row]:
    """Whole updates of the paper's MNIST autoencoder."""
    params, model = _network(AUTOENCODER, 4)
    inputs = jax.random.uniform(jax.random.key(1), (BATCH, AUTOENCODER[0]))
    batch = (inputs, inputs)
    objective = kfgn.Objective(model, kfgn.losses.sigmoid_binary_cross_entropy, l2=1e-5)
    rate = _product_rate()
    sgd = _sgd_step(objective, params, batch, blocks)
    rows = [Row("SGD step", 1.0, "itself", _gradient_flops(AUTOENCODER) / rate / sgd.median, "",
                sgd.median, sgd.compile_seconds, sgd.temporary_bytes / 2**20)]  # fmt: skip
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("KFRA update, no momentum, all fresh", "kfra", {**FRESH, "momentum": False}, "5.4"),
        ("KFRA update, no momentum", "kfra", {"momentum": False}, ""),
        ("KFRA update, all fresh", "kfra", FRESH, ""),
        ("KFRA update, the default", "kfra", {}, "2.9 (2.5)"),
        ("KFAC update, the default", "kfac", {}, "2.9 (2.5)"),
        ("KFAC update, periods by cost", "kfac",
         {"refresh_factors_every": "auto", "refresh_inverse_every": "auto"}, ""),
    ]  # fmt: skip
    for name, method, changed, goal in cases:
        result = _second_order(objective, method, params, batch, changed, blocks)
        floor = None
        if method == "kfra":
            flops = _update_flops(AUTOENCODER, **changed)
            floor = flops / rate / sgd.median
        rows.append(_row(name, result, sgd, "SGD step", floor, goal))
        _say(console, rows[-1])
    return rows


def classifier_rows(console: Console, blocks: int) -> list[Row]:
    """Exact curvature of a 784-1000-500-250-10 classifier."""
    params, model = _network(CLASSIFIER)
    inputs = jax.random.uniform(jax.random.key(1), (BATCH, CLASSIFIER[0]))
    targets = jax.random.randint(jax.random.key(2), (BATCH,), 0, CLASSIFIER[-1])
    batch = (inputs, targets)
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(model, loss)
    gradient = timed(jax.grad(objective), params, batch, repeats=41)
    rate = _product_rate()

    def kflr(params, batch):
        (_, grads), curvature = kfgn.value_grad_and_curvature(objective, "kflr")(params, batch)
        return grads, curvature.factors

    def hessian(params, batch):
        return kfgn.hessian(objective).pre_activation(params, batch, reduce="mean")

    diagonal = kfgn.hessian(objective).diagonal
    rows = []
    for name, function, repeats, flops, goal in [
        ("KFLR factors and gradient", kflr, 21, None, "7"),
        ("Hessians per example, reduced to their mean", hessian, 3,
         BATCH * _hessian_flops(CLASSIFIER), "320"),
        ("exact Hessian diagonal", diagonal, 3,
         BATCH * _hessian_flops(CLASSIFIER, diagonal=True), "150"),
    ]:  # fmt: skip
        result = timed(function, params, batch, repeats=repeats)
        floor = flops / rate / gradient.median if flops else None
        rows.append(_row(name, result, gradient, "gradient", floor, goal))
        _say(console, rows[-1])
    return rows


def wide_rows(console: Console, blocks: int) -> list[Row]:
    """KFLR of the autoencoder: 784 output columns, one at a time."""
    params, model = _network(AUTOENCODER, 4)
    inputs = jax.random.uniform(jax.random.key(1), (BATCH, AUTOENCODER[0]))
    objective = kfgn.Objective(model, kfgn.losses.sigmoid_binary_cross_entropy)
    gradient = timed(jax.grad(objective), params, (inputs, inputs), repeats=15)

    def kflr(params, batch):
        return kfgn.value_grad_and_curvature(objective, "kflr")(params, batch)[1].factors

    result = timed(kflr, params, (inputs, inputs), repeats=1)
    row = _row("KFLR with 784 outputs", result, gradient, "gradient", None, "under 2 GiB")
    _say(console, row)
    return [row]


def _network(sizes: Sequence[int], *linear: int) -> tuple[Any, Callable[..., Any]]:
    """Parameters and model of a tanh chain; those layers and the last are linear."""
    return chain_params(sizes, 0), chain(linear=linear)


def _sgd_step(objective: kfgn.Objective, params: Any, batch: Any, blocks: int) -> Timed:
    def step(params, batch):
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(objective)(params, batch))

    return timed_updates(step, params, batch, blocks=blocks)


def _second_order(
    objective: kfgn.Objective, method: str, params: Any, batch: Any, changed: Any, blocks: int
) -> Timed:
    optimizer = second_order(method, objective, params, batch, changed)

    def step(carry: Any, batch: Any) -> Any:
        params, state, key = carry
        key, now = jax.random.split(key)
        params, state, _ = optimizer.step(params, state, batch, now)
        return params, state, key

    carry = (params, optimizer.init(params), jax.random.key(0))
    return timed_updates(step, carry, batch, blocks=blocks)


# FLOPs, counted as two per multiplication; factorizations and inverses as n^3 together.


def _gradient_flops(sizes: Sequence[int]) -> float:
    products = [a * b for a, b in itertools.pairwise(sizes)]
    return 2 * BATCH * (3 * sum(products) - products[0])


def _update_flops(
    sizes: Sequence[int], momentum: bool = True, refresh_factors_every: int = 5,
    refresh_inverse_every: int = 5,
) -> float:  # fmt: skip
    pairs = list(itertools.pairwise(sizes))
    activation = sum(2 * BATCH * (a + 1) ** 2 for a, _ in pairs)
    slopes = sum(2 * BATCH * b**2 for _, b in pairs[:-1] if b != min(sizes))
    recursion = sum(2 * a * b * (a + b) for a, b in pairs[1:])
    inverses = sum((a + 1) ** 3 + b**3 for a, b in pairs) / refresh_inverse_every
    directions = sum(2 * (a + 1) * b * (a + 1 + b) for a, b in pairs)
    products = [a * b for a, b in pairs]
    linear_pass = 2 * MODEL_EXAMPLES * (2 * sum(products) - products[0])
    passes = (2 if momentum else 1) * linear_pass
    factors = (activation + slopes + recursion) / refresh_factors_every
    return _gradient_flops(sizes) + factors + inverses + directions + passes


def _hessian_flops(sizes: Sequence[int], diagonal: bool = False) -> float:
    pairs = list(itertools.pairwise(sizes))[1:]
    total = sum(2 * a * b * (a + b) for a, b in pairs)
    first, second = pairs[0]
    return total - (2 * first * first * second if diagonal else 0)


def _product_rate() -> float:
    square = jax.random.normal(jax.random.key(0), (1000, 1000))
    return 2e9 / timed(lambda a: a @ a, square, repeats=41).median


def _row(
    name: str, result: Timed, yardstick: Timed, called: str, floor: float | None, goal: str
) -> Row:
    ratio = result.median / yardstick.median
    memory = result.temporary_bytes / 2**20
    return Row(name, ratio, called, floor, goal, result.median, result.compile_seconds, memory)


def _say(console: Console, row: Row) -> None:
    console.print(f"{row.name}: {row.ratio:.2f} x {row.yardstick}", highlight=False)


def _table(rows: Sequence[Row]) -> Table:
    columns = ("what", "ratio", "to", "FLOP floor", "goal", "ms", "compile s", "temp MiB")
    cells = [
        (row.name, f"{row.ratio:.2f}", row.yardstick, figure(row.floor, ".2f"), row.goal,
         f"{1e3 * row.seconds:.1f}", f"{row.compile_seconds:.1f}", f"{row.temporary_mib:.0f}")
        for row in rows
    ]  # fmt: skip
    return table("What curvature costs", columns, cells)
