"""``python -m benchmarks loops``: what compiling and a step of KFAC cost where a model has loops.

A recurrent network over time steps, and transformer blocks that `nn.scan` runs over, each beside
Adam's step of the same objective in the same process. Compiling includes tracing, and for KFAC
making the optimizer; no compilation cache may be set.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import kfgn
from benchmarks.harness.arguments import RESULTS, options, positive_int
from benchmarks.harness.display import make_console
from benchmarks.harness.record import write_rows
from benchmarks.harness.timing import timed

WIDTH, CLASSES, EXAMPLES = 32, 4, 16
CASES = (
    [("GRU, time steps", n) for n in (16, 96, 1000)]
    + [("transformer, layers", n) for n in (8, 24, 48)]
)  # fmt: skip


class Recurrent(nn.Module):
    """A GRU, whose last state is classified."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        states: Any = nn.RNN(nn.GRUCell(WIDTH))(x)
        return nn.Dense(CLASSES)(states[:, -1])


class Block(nn.Module):
    """Attention and two dense layers, each behind a LayerNorm and beside an identity."""

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        a = nn.LayerNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(4)(a, a)
        a = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(h)))
        return h + nn.Dense(WIDTH)(a), None


class Transformer(nn.Module):
    """Blocks whose parameters are stacked."""

    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return nn.Dense(CLASSES)(jnp.mean(scan()(x, None)[0], axis=1))


class Row(NamedTuple):
    """KFAC's step beside Adam's."""

    model: str
    length: int
    adam_compile_seconds: float
    compile_ratio: float
    adam_step_seconds: float
    step_ratio: float
    adam_temporary_mib: float
    temporary_ratio: float


def main(arguments: Sequence[str]) -> None:
    """Measures every case, prints it and writes it down."""
    parser = options("loops", __doc__, seeded=False, data=False, out=RESULTS / "loops.json")
    parser.add_argument(
        "--longest", type=positive_int, default=1000, help="leave out longer loops (1000)"
    )
    given, console = parser.parse_args(arguments), make_console()
    rows = []
    for name, length in CASES:
        if length <= given.longest:
            rows.append(row := measured(name, length))
            console.print(
                f"{name} {length}: compiling {row.compile_ratio:.1f} times Adam's "
                f"{row.adam_compile_seconds:.1f} s, a step {row.step_ratio:.1f} times, "
                f"memory {row.temporary_ratio:.1f} times",
                highlight=False,
            )
    write_rows(given.out, "loops", arguments, rows)
    console.print(f"written to {given.out}")


def measured(name: str, length: int) -> Row:
    """One case."""
    recurrent = name.startswith("GRU")
    model: nn.Module = Recurrent() if recurrent else Transformer(length)
    shape = (EXAMPLES, length, 8) if recurrent else (EXAMPLES, 8, WIDTH)
    inputs, key = jax.random.normal(jax.random.key(0), shape), jax.random.key(1)
    batch = inputs, jax.random.randint(key, (EXAMPLES,), 0, CLASSES)
    params = model.init(key, inputs)
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(model.apply, loss)
    adam = optax.adam(1e-3)

    def first_order(params: Any, state: Any) -> Any:
        updates, state = adam.update(jax.grad(objective)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    optimizer = kfgn.kfac(objective, params, batch)
    reading = time.perf_counter() - start
    curvature_fn = kfgn.value_grad_and_curvature(objective, "kfac")

    def second_order(params: Any, state: Any) -> Any:
        (_, grads), curvature = curvature_fn(params, batch, key=key)
        updates, state = optimizer.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    own = timed(first_order, params, adam.init(params))
    found = timed(second_order, params, optimizer.init(params))
    return Row(
        name,
        length,
        own.compile_seconds,
        (reading + found.compile_seconds) / own.compile_seconds,
        own.median,
        found.median / own.median,
        own.temporary_bytes / 2**20,
        found.temporary_bytes / own.temporary_bytes,
    )
