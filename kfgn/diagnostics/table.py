"""The table that `kfgn.inspect` prints."""

from collections.abc import Sequence

from kfgn.base.types import Shape
from kfgn.curvature import recursion
from kfgn.diagnostics.rows import Row, Totals
from kfgn.diagnostics.text import aligned, bytes_text, flops_text, shortened

_LITTLE_KNOWN = (
    "factors with more than {:,} rows take more than they know: kfgn.make keeps blocks of them"
)


def block_lines(rows: Sequence[Row], total: Totals) -> list[str]:
    """A line for every block, and one for all of them."""
    empty = [""] * 5
    between = [flops_text(n) if n else "" for n in total.between.values()]
    lines = [
        ["block", "parameters", "kind", "Q", "G", "sharing", "factors", *total.flops, "inversion"],
        *map(_cells, rows),
        ["(between layers)", *empty, "", *between, ""],
        ["total", *empty, bytes_text(total.bytes), *_costs(total)],
    ]
    return aligned(lines, right=2 + len(total.flops))


def _costs(of: Row | Totals) -> list[str]:
    return [flops_text(n) for n in (*of.flops.values(), of.inversion)]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        shortened(", ".join(p.removeprefix(f"{row.name}/") for p in row.parameters), 40),
        row.kind,
        "x".join(map(str, row.activation)),
        "x".join(map(str, row.pre_activation)),
        _sharing(row),
        bytes_text(row.bytes),
        *_costs(row),
    )


def _sharing(row: Row) -> str:
    counts = {k: getattr(row, k) for k in ("positions", "uses", "slots", "groups")}
    parts = [f"{n} {name}" for name, n in counts.items() if n > 1]
    return ", ".join(parts + ["transposed"] * row.transposed) or "-"


def unassigned_lines(reasons: dict[str, str], shapes: dict[str, Shape]) -> list[str]:
    """The parameters in no block, and why."""
    rows = [("no block", "shape", "reason")]
    for name, reason in reasons.items():
        shape = str(shapes[name])
        rows.append((name, shape, shortened(reason.removeprefix(f"(shape {shape}) "), 120)))
    return ["", *aligned(rows)] if reasons else []


def total_lines(total: Totals, outside: int) -> list[str]:
    """What updates cost; `outside` is the number of parameters in no block."""
    return [
        "",
        f"{total.parameters:,} parameters, {outside:,} in no block; costs in FLOPs per batch",
        f"kflr: {total.columns:,} column(s) of the output Hessian's root, a backward pass for each",
        f"kfra: matrices of up to {total.largest:,} x {total.largest:,} "
        f"({bytes_text(total.matrix_bytes)}), {'within' if total.feasible else 'BEYOND'} "
        f"the limit of {bytes_text(recursion.MATRIX_BYTES)}"
        if total.feasible or total.largest
        else "kfra: has loops to unroll that are longer than it goes",
        "an update, in gradients: " + ", ".join(f"{n} {x:.1f}" for n, x in total.update.items()),
        'by periods "auto": '
        + ", ".join(f"{n} {x:.1f}, every {total.periods[n]}" for n, x in total.update_auto.items()),
        'by inverse="ekfac", in gradients: '
        + ", ".join(f"{n} {x:.1f}" for n, x in total.update_ekfac.items()),
        *([_LITTLE_KNOWN.format(total.split_at)] if total.split_at else []),
        *total.too_large,
    ]
