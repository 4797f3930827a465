"""What kfgn makes of an objective: a table of its blocks, their factors and their cost."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import jax

from kfgn.base.linalg import factor_dtype
from kfgn.base.trees import named_leaves
from kfgn.base.types import PyTree, Shape
from kfgn.curvature import recursion
from kfgn.curvature.methods import METHODS
from kfgn.diagnostics.costs import (
    DECOMPOSITION,
    ENTRY,
    REFRESH_EVERY,
    Setting,
    forward_cost,
    inversion_cost,
    linear_cost,
    moments_cost,
    node_cost,
    period,
    setting,
    solve_cost,
    split_at,
    update_cost,
    use_cost,
    values_cost,
    whole_sizes,
)
from kfgn.diagnostics.machine import Machine
from kfgn.diagnostics.per_device import PerDevice, per_device
from kfgn.diagnostics.plan import Plan, plan_lines, plans
from kfgn.diagnostics.rows import Row, Totals
from kfgn.diagnostics.table import block_lines, total_lines, unassigned_lines
from kfgn.model.graph.unite import unite
from kfgn.model.layers.factor_size import most_rows, too_large
from kfgn.model.layers.layer import Layer
from kfgn.model.program.equations import size
from kfgn.objective.sum_of import AnyObjective, named_term, require_objective


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection:
    """What `kfgn.inspect` found; `str` of it is the table that was printed.

    >>> import io, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> batch = jnp.ones((8, 3)), jnp.ones((8, 2))
    >>> found = kfgn.inspect(objective, jnp.ones((3, 2)), batch, file=io.StringIO())
    >>> found.totals.parameters, found.totals.columns
    (6, 2)
    """

    rows: tuple[Row, ...]
    unassigned: dict[str, str]  # by path of a parameter without a block: the reason
    shapes: dict[str, Shape]  # of every parameter, by path
    totals: Totals
    per_device: PerDevice | None = None  # where a mesh was given
    plan: tuple[Plan, ...] = ()  # seconds, where a mesh or a machine was given

    def __repr__(self) -> str:
        return f"<Inspection of {len(self.rows)} blocks, {len(self.unassigned)} parameters in none>"

    def __str__(self) -> str:
        outside = sum(math.prod(self.shapes[name]) for name in self.unassigned)
        lines = block_lines(self.rows, self.totals)
        lines += unassigned_lines(self.unassigned, self.shapes) + total_lines(self.totals, outside)
        lines += [str(self.per_device)] if self.per_device else []
        return "\n".join([*lines, *plan_lines(self.plan)])


def inspect(
    objective: AnyObjective,
    params: PyTree,
    batch: Any,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    machine: Machine | None = None,
    activation_rows: int | None = None,
    file: TextIO | None = None,
) -> Inspection:
    """Prints a table of the objective's blocks, from shapes alone, and returns it.

    The costs are FLOPs, estimated for the batch's N examples, sharing "expand"
    and spatial "joint". A use of a kernel has S groups, T positions, `d_in`
    inputs, `d_a` with the bias, and `d_out` outputs. One product with the
    kernel takes `P = 2 S T d_in d_out`, or `D_out` for a shift; the use's whole
    input and pre-activation have `D_in` and `D_out` entries. Summed over uses:

        activation factor:  2 N S T d_a^2, N being less with `activation_rows`, or N T where it
                            is a diagonal
        one column:         2 N S T d_out^2, its moment, and N P, the way back to the input
        congruence:         P (D_in + D_out), of the mean matrix on its way back to the input
        inversion:          d^3 for each matrix in both factors (by Cholesky), d for a diagonal

    "kfac" (with one sample) and "empirical" take the activation factor and one column,
    "kflr" as many columns as the output Hessian's root has, "kfra" the congruence.

    The way back ends, and costs nothing, where the input is data; in a loop, where it is
    in every iteration. The positions of a single row that is added everywhere are summed
    first, so that T is 1.

    What lies between the layers is little for most methods, and left out.
    For "kfra", where it may be most of the cost, it has a line of its own:
    2 N D D' for an elementwise function from D to D' entries, and D + D'
    backward passes for any other, for each example unless it is linear. In the
    updates that are predicted an entry of these counts as 16, unless it is of a
    product, for the time that memory takes.

    Args:
      objective: the objective.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: `(inputs, targets)`, likewise; values are checked where there are any.
      mesh: say as well what an update costs each of these devices, the batch spread over all,
        and what they send: `PerDevice`, and in seconds: a `Plan` for each method.
      machine: the rates of a device that seconds are predicted by, such as `measure_machine()`
        finds here; those of a large accelerator if None. Without a mesh it is one device.
      activation_rows: as for `kfgn.value_grad_and_curvature`; `kfgn.make` says 4.
      file: where to print, standard output if None.

    Raises:
      BatchError, ModelError, LossError, ParameterError, OptionError: the input
        does not fit. Parameters without a block are no error here.

    >>> import io, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(
    ...     lambda p, x: jnp.tanh(x @ p["w"]), kfgn.losses.half_squared_error
    ... )
    >>> batch = (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> found = kfgn.inspect(objective, {"w": jnp.ones((3, 2))}, batch, file=io.StringIO())
    >>> found.rows[0].activation, found.rows[0].flops["kfac"]
    ((3, 3), 104)
    """
    found = inspection_of(objective, params, batch, activation_rows)
    if mesh is not None or machine is not None:
        devices = 1 if mesh is None else mesh.size
        itemsize = factor_dtype(*(x.dtype for x in jax.tree.leaves(params))).itemsize
        costs = per_device(found.rows, found.totals, found.shapes, devices, itemsize)
        plan = plans(len(found.rows), found.totals, costs, machine or Machine())
        found = dataclasses.replace(
            found, per_device=costs if mesh is not None else None, plan=plan
        )
    print(found, file=file)
    return found


def inspection_of(
    objective: AnyObjective,
    params: PyTree,
    batch: Any,
    activation_rows: int | None = None,
    large_factors: str = "whole",
    factor_limit: int | None = None,
) -> Inspection:
    """What `inspect` prints, with options of `kfgn.value_grad_and_curvature`."""
    require_objective(objective)
    united = unite(objective, params, batch, None, large_factors, factor_limit)
    sizes = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    parts: dict[str, list[Row]] = {name: [] for name in united.layers}
    totals: list[Totals] = []
    sizes_of: list[tuple[int, int]] = []
    for name, term in united.terms.items():
        with named_term(name):
            at = setting(term, params, activation_rows)
        own = {term.names[n]: _row(at, layer) for n, layer in term.graph.layers.items()}
        for n, row in own.items():
            parts[n].append(row._replace(name=n))
        sizes_of += whole_sizes(at)
        totals.append(_totals(at, tuple(own.values()), sizes))
    rows = tuple(map(_together, parts.values()))
    whole = _of_all(totals, rows, united.layers.values())._replace(split_at=split_at(sizes_of))
    return Inspection(rows, dict(united.reasons), sizes, whole)


def _together(rows: Sequence[Row]) -> Row:
    """The row of a block from those in the terms of a sum, which invert it once."""
    return rows[0]._replace(
        positions=max(row.positions for row in rows),
        uses=sum(row.uses for row in rows),
        flops={n: sum(row.flops[n] for row in rows) for n in METHODS},
    )


def _of_all(totals: Sequence[Totals], rows: Sequence[Row], layers: Iterable[Layer]) -> Totals:
    whole = totals[0]._replace(
        bytes=sum(row.bytes for row in rows),
        between={n: sum(t.between[n] for t in totals) for n in METHODS},
        flops={n: sum(t.flops[n] for t in totals) for n in METHODS},
        waiting={n: sum(t.waiting[n] for t in totals) for n in METHODS},
        inversion=sum(row.inversion for row in rows),
        solve=sum(map(solve_cost, layers)),
        gradient=sum(t.gradient for t in totals),
        linear=sum(t.linear for t in totals),
        columns=sum(t.columns for t in totals),
        roots=sum(t.roots for t in totals),
        too_large=tuple(dict.fromkeys(text for t in totals for text in t.too_large)),
        largest=max(t.largest for t in totals),
        matrix_bytes=max(t.matrix_bytes for t in totals),
        feasible=all(t.feasible for t in totals),
        unrolls=any(t.unrolls for t in totals),
        values=sum(t.values for t in totals),
        moments={n: sum(t.moments[n] for t in totals) for n in METHODS},
    )
    costs = whole.inversion, whole.solve, whole.gradient, whole.linear
    times = {n: f + whole.waiting[n] for n, f in whole.flops.items()}
    periods = {n: period(f, whole.inversion, whole.gradient) for n, f in times.items()}
    return whole._replace(
        update={n: update_cost(f, *costs, REFRESH_EVERY) for n, f in times.items()},
        periods=periods,
        update_auto={n: update_cost(f, *costs, periods[n]) for n, f in times.items()},
        update_ekfac={
            n: update_cost(
                f + whole.moments[n], DECOMPOSITION * costs[0], *costs[1:], REFRESH_EVERY
            )
            for n, f in times.items()
        },
    )


def _row(at: Setting, layer: Layer) -> Row:
    shapes = (layer.activation_shape, layer.pre_activation_shape)
    uses = [use_cost(at, layer, use) for use in layer.uses.values()]
    return Row(
        layer.name,
        layer.parameters,
        layer.kind,
        *shapes,
        positions=max(layer.positions(slot) for slot in range(len(layer.slots))),
        uses=max(sum(use.form.turns // use.form.slots for use in slot) for slot in layer.slots),
        slots=layer.kernels,
        groups=layer.first.form.groups // layer.first.form.slots,
        transposed=bool(layer.flipped),
        bytes=sum(map(math.prod, shapes)) * at.itemsize,
        flops={name: sum(map(method.flops, uses)) for name, method in METHODS.items()},
        inversion=inversion_cost(layer),
    )


def _totals(at: Setting, rows: Sequence[Row], shapes: dict[str, Shape]) -> Totals:
    nodes = at.nodes or ()
    largest = max((size(v) for n in nodes for v in (*n.outputs, *n.inputs)), default=0)
    alone = [node for node in nodes if node.use is None]
    walk, taken = (sum(node_cost(n, at.examples, entry) for n in alone) for entry in (1, ENTRY))
    between = {name: method.flops_between(walk, at.loss) for name, method in METHODS.items()}
    waiting = {
        name: method.flops_between(taken, at.loss) - between[name]
        for name, method in METHODS.items()
    }
    flops = {name: sum(row.flops[name] for row in rows) + between[name] for name in METHODS}
    forward = sum(map(forward_cost, nodes or at.graph.uses.values()))
    layers = at.graph.layers.values()
    moments = sum(moments_cost(at, layer, use) for layer in layers for use in layer.uses.values())
    return Totals(
        parameters=sum(map(math.prod, shapes.values())),
        bytes=sum(row.bytes for row in rows),
        between=between,
        flops=flops,
        waiting=waiting,
        inversion=sum(row.inversion for row in rows),
        solve=0,  # of all terms together, as periods and updates are
        gradient=3 * at.examples * forward,
        linear=linear_cost(forward, at.examples),
        update={},
        periods={},
        update_auto={},
        columns=at.columns,
        roots=at.loss.root,
        largest=largest,
        matrix_bytes=largest**2 * at.itemsize,
        feasible=at.nodes is not None and largest**2 * at.itemsize <= recursion.MATRIX_BYTES,
        unrolls=bool(at.graph.model.loops),
        values=at.examples * at.itemsize * values_cost(at),
        moments={n: method.passes(at.columns) * moments for n, method in METHODS.items()},
        update_ekfac={},
        too_large=tuple(
            too_large(name, layer, side, most_rows(layer))
            for name, layer in at.graph.layers.items()
            for side in (layer.d_out, 0 if layer.indexed else layer.activation_size)
            if side > most_rows(layer)
        ),
    )
