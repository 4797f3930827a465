"""``python -m benchmarks refresh``: what a refresh of the inverses takes of each of many devices.

KFAC trains a chain of tanh layers of one width on one to eight devices, which on a CPU share its
cores, with each device inverting all factors and with each inverting a share (`factor_sharding`).
Inverses are refreshed at every second update; a refresh is what such an update takes more than the
ones beside it, of the clock and of all cores, where no factors are looked at. The work of a device
is what it takes of the cores over the number of devices.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich.table import Table

import kfgn
from benchmarks.harness.arguments import options, positive_int
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment
from benchmarks.harness.models import chain, chain_params
from benchmarks.harness.timing import compiled

DEVICES = (1, 2, 4, 8)
CLASSES, EXAMPLES = 10, 256
START, END = 16, 32  # factors are looked at before and after, not between


class Row(NamedTuple):
    """A refresh on so many devices, in seconds."""

    devices: int
    shares: bool
    clock: float
    cores: float  # of all cores together

    @property
    def of_a_device(self) -> float:
        """The work of one device."""
        return self.cores / self.devices


def main(arguments: Sequence[str]) -> None:
    """Measures every number of devices both ways, prints the table and writes everything down."""
    parser = options("refresh", __doc__, data=False, resumable=True)
    add = parser.add_argument
    add("--width", type=positive_int, default=512, help="of the layers (512)")
    add("--layers", type=positive_int, default=8, help="of one width (8)")
    given, rows = parser.parse_args(arguments), list[Row]()
    with contextlib.suppress(RuntimeError):  # where devices are there already
        jax.config.update("jax_num_cpu_devices", max(DEVICES))
        # Two programs at once on more devices than cores may each wait for the other's threads.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    counts = [n for n in DEVICES if n <= jax.device_count()]
    ways = [(n, shares) for n in counts for shares in (False, True) if n > 1 or not shares]
    with experiment("refresh", arguments, given, len(ways)) as run:
        for devices, shares in ways:
            what = {"devices": devices, "shares": shares, "seed": given.seed}
            measure = functools.partial(_measure, devices, shares, given)
            rows.append(Row(devices, shares, *run.measure(what, measure)))
            run.tick(f"{devices} devices" + ", shares" * shares)
        measured = [{**row._asdict(), "of a device": row.of_a_device} for row in rows]
        run.record(measured, [_table(rows)], {"refresh": _plot(rows)})


def _measure(devices: int, shares: bool, given: Any) -> list[float]:
    """Seconds of a refresh, by the clock and of the cores."""
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("d",), kind, devices=jax.devices()[:devices])
    rows, copies = (NamedSharding(mesh, PartitionSpec(*names)) for names in (["d"], []))
    params = chain_params([given.width] * (given.layers + 1) + [CLASSES], given.seed)
    keys = jax.random.split(jax.random.key(given.seed))
    batch = (
        jax.random.uniform(keys[0], (EXAMPLES, given.width)),
        jax.random.randint(keys[1], (EXAMPLES,), 0, CLASSES),
    )
    params, batch = jax.device_put(params, copies), jax.device_put(batch, rows)
    objective = kfgn.Objective(chain(), kfgn.losses.softmax_cross_entropy_with_integer_labels)
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfac")
    optimizer = kfgn.kfac(
        *(objective, params, batch),
        refresh_factors_every=1000,  # after the first ten, the 16th and the 32nd
        refresh_inverse_every=2,
        factor_sharding=rows if shares else None,
    )

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state, key = optimizer.init(params), jax.device_put(jax.random.key(0), copies)
    program, *_ = compiled(step, params, state, batch, key)
    taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for count in range(1, END):
        before = jax.device_get(optax.tree_utils.tree_get(state, "inverses"))
        start = time.perf_counter(), time.process_time()
        params, state = jax.block_until_ready(program(params, state, batch, key))
        own = time.perf_counter() - start[0], time.process_time() - start[1]
        after = jax.device_get(optax.tree_utils.tree_get(state, "inverses"))
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
        if count > START:
            taken[any(np.any(a != b) for a, b in pairs)].append(own)
    refreshing, others = (np.median(taken[due], axis=0) for due in (True, False))
    return [float(x) for x in refreshing - others]


def _table(rows: list[Row]) -> Table:
    alone = rows[0].of_a_device
    lines = [
        [r.devices, "a share" if r.shares else "all", f"{1000 * r.clock:.0f}",
         f"{1000 * r.of_a_device:.0f}", f"{r.of_a_device / alone:.2f}"]
        for r in rows
    ]  # fmt: skip
    head = ["devices", "each inverts", "ms of the clock", "ms of a core, each", "of one device's"]
    return table("A refresh of all inverses", head, lines)


def _plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for shares, label in ((False, "each device inverts all"), (True, "each inverts a share")):
        chosen = [r for r in rows if r.shares == shares or r.devices == 1]
        axes.plot([r.devices for r in chosen], [r.of_a_device for r in chosen], "o-", label=label)
    even = [rows[0].of_a_device / r.devices for r in rows]
    axes.plot([r.devices for r in rows], even, "k:", label="one device's, divided")
    # Small networks' differences may be noise, of either sign.
    scale = "log" if all(r.of_a_device > 0 for r in rows) else "linear"
    axes.set(xscale="log", yscale=scale, xlabel="devices", ylabel="seconds of a core, each")
    counts = sorted({r.devices for r in rows})
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    return figure
