"""``python -m benchmarks plan``: the seconds of an update that `kfgn.inspect` predicts, and takes.

Chains of tanh layers of one width under softmax cross-entropy, one size changed at a time: width D,
depth L, examples N, classes K, and devices, which on a CPU share its cores. The rates are those of
`kfgn.diagnostics.measure_machine`, measured once for each number of devices; the measured seconds
are means over ten updates with factors and inverses every five, after as many more.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import options, positive_int
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.plots import COLORS
from benchmarks.harness.timing import timed, timed_updates

BASE = {"D": 256, "L": 4, "N": 1000, "K": 10, "devices": 1}
SWEEPS: dict[str, tuple[int, ...]] = {
    "D": (64, 128, 256, 512),
    "L": (2, 8),
    "N": (250, 4000),
    "K": (40,),
    "devices": (2, 8),
}
METHODS = ("kfra", "kflr", "kfac")
PERIOD = 10  # updates in a block: factors and inverses are due twice


class Row(NamedTuple):
    """One size and method, in seconds."""

    swept: str
    value: int
    method: str  # or "gradient"
    shares: bool
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """How many times as long as it takes was predicted."""
        return self.predicted / self.measured


def main(arguments: Sequence[str]) -> None:
    """Measures the machine and every size, prints the table and writes everything down."""
    parser = options("plan", __doc__, data=False, resumable=True)
    add = parser.add_argument
    add("--blocks", type=positive_int, default=1, help="of ten updates, whose median counts (1)")
    given, rows = parser.parse_args(arguments), []
    with contextlib.suppress(RuntimeError):  # where devices are there already
        jax.config.update("jax_num_cpu_devices", max(SWEEPS["devices"], default=1))
        # Two programs at once on more devices than cores may each wait for the other's threads.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    sizes = [(n, v) for n, values in SWEEPS.items() for v in values]
    sizes = [(n, v) for n, v in sizes if n != "devices" or v <= jax.device_count()]
    rates: dict[int, Any] = {}
    with experiment("plan", arguments, given, len(sizes)) as run:
        for devices in sorted({BASE["devices"], *(v for n, v in sizes if n == "devices")}):
            found = run.measure({"rates of": devices}, functools.partial(_rates, devices))
            rates[devices] = kfgn.diagnostics.Machine(*found)
        for swept, value in sizes:
            at = {**BASE, swept: value}
            measure = functools.partial(_measure, at, rates[at["devices"]], given)
            found = run.measure({"swept": swept, "value": value, "seed": given.seed}, measure)
            rows += [Row(swept, value, *row) for row in found]
            run.tick(f"{swept} = {value}")
        measured = {
            "rates": {n: m._asdict() for n, m in rates.items()},
            "rows": [row._asdict() for row in rows],
            "off": {n: _off(rows, n) for n in ("gradient", *METHODS)},
        }
        run.record(measured, [_table(rows), _rate_table(rates)], {"plan": _plot(rows)}, BASE)


def _mesh(devices: int) -> jax.sharding.Mesh:
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("d",), kind, devices=jax.devices()[:devices])


def _rates(devices: int) -> list[float]:
    return list(kfgn.diagnostics.measure_machine(_mesh(devices)))


def _measure(at: dict[str, int], machine: Any, given: Any) -> list[tuple[Any, ...]]:
    mesh = _mesh(at["devices"])
    rows, copies = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
        for names in (["d"], [])
    )
    params = chain_params([at["D"]] * at["L"] + [at["K"]], given.seed)
    keys = jax.random.split(jax.random.key(given.seed))
    batch = (
        jax.random.uniform(keys[0], (at["N"], at["D"])),
        jax.random.randint(keys[1], (at["N"],), 0, at["K"]),
    )
    objective = kfgn.Objective(chain(), kfgn.losses.softmax_cross_entropy_with_integer_labels)
    plan = kfgn.inspect(objective, params, batch, mesh=mesh, machine=machine, file=io.StringIO())
    params, batch = jax.device_put(params, copies), jax.device_put(batch, rows)
    gradient = timed(jax.value_and_grad(objective), params, batch, repeats=7).median
    found: list[tuple[Any, ...]] = [("gradient", False, plan.plan[0].gradient, gradient)]
    for line in plan.plan:
        if line.method not in METHODS or line.inverse != "factored":
            continue
        sharding = rows if line.shares else None
        optimizer, curvature_fn = kfgn.make(
            objective, params, batch, method=line.method, factor_sharding=sharding
        )

        def step(carry: Any, batch: Any, optimizer: Any = optimizer, of: Any = curvature_fn) -> Any:
            params, state, key = carry
            key, now = jax.random.split(key)
            (_, grads), curvature = of(params, batch, key=now)
            updates, state = optimizer.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state, key

        start = params, optimizer.init(params), jax.device_put(jax.random.key(0), copies)
        taken = timed_updates(step, start, batch, blocks=given.blocks, period=PERIOD)
        found.append((line.method, line.shares, line.update, taken.median))
    return found


def _off(rows: list[Row], method: str) -> dict[str, float]:
    """The mean factor by which a prediction is off, in either direction, and the worst."""
    logs = [abs(np.log(row.ratio)) for row in rows if row.method == method]
    return {"mean": float(np.exp(np.mean(logs))), "worst": float(np.exp(max(logs)))}


def _table(rows: list[Row]) -> Table:
    lines = [
        [f"{r.swept} = {r.value}", r.method + " in shares" * r.shares,
         *(f"{1000 * x:.3g}" for x in (r.predicted, r.measured)), f"{r.ratio:.2f}"]
        for r in rows
    ]  # fmt: skip
    offs = {n: _off(rows, n) for n in ("gradient", *METHODS)}
    said = ", ".join(f"{n} {x['mean']:.2f} (worst {x['worst']:.2f})" for n, x in offs.items())
    head = ["", "", "predicted ms", "measured ms", "ratio"]
    return table(f"Milliseconds of an update; off by a factor of {said}", head, lines)


def _rate_table(rates: dict[int, Any]) -> Table:
    lines = [
        [n, *(f"{getattr(m, n):.3g}" for m in rates.values())]
        for n in kfgn.diagnostics.Machine._fields
    ]
    return table("Rates of a device, a second", ["devices", *map(str, rates)], lines)


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for method in ("gradient", *METHODS):
        chosen = [r for r in rows if r.method == method]
        color = COLORS.get(method, "black")
        x, y = [r.measured for r in chosen], [r.predicted for r in chosen]
        axes.plot(x, y, "o", color=color, label=method, alpha=0.7)
    ends = [min(r.measured for r in rows), max(r.measured for r in rows)]
    for factor, style in ((1, "k-"), (2, "k:"), (0.5, "k:")):
        axes.plot(ends, [factor * x for x in ends], style, linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured seconds", ylabel="predicted seconds")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    return figure
