"""``python -m benchmarks sharing``: what Kronecker products lose where kernels are shared.

For small networks on real digits, every layer's exact Gauss-Newton block is formed, and the
relative distance (Frobenius norm) of each method's Kronecker product from it is reported: for one
example, where the pre-activation matrices are exact and only the product loses something, and for
64 examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.table import Table

import kfgn
from benchmarks.datasets import load
from benchmarks.harness.arguments import RESULTS, options, positive_int
from benchmarks.harness.display import make_console, table
from benchmarks.harness.optimizers import trained, with_gradient
from benchmarks.harness.record import write_rows

METHODS: dict[str, dict[str, Any]] = {
    "kflr expand": {"method": "kflr"},
    "kflr reduce": {"method": "kflr", "sharing": "reduce"},
    "kfra joint": {"method": "kfra"},
    "kfra homogeneous": {"method": "kfra", "spatial": "homogeneous"},
    "kfra homogeneous, reduce": {
        "method": "kfra", "spatial": "homogeneous", "sharing": "reduce",
    },
}  # fmt: skip


class Row(NamedTuple):
    """The distance of one layer's Kronecker product from its exact block."""

    model: str
    examples: int
    layer: str
    method: str
    distance: float


class Convolutional(nn.Module):
    """Two convolutions with a stride, then a mean over positions, or all of them flattened."""

    flatten: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Conv(6, (3, 3), strides=2)(x))
        x = x.reshape(len(x), -1) if self.flatten else x.mean(axis=(1, 2))
        return nn.Dense(10)(x)


class Attention(nn.Module):
    """One transformer layer on the rows of an image."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6)(x[..., 0])
        h = h + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h))
        h = h + nn.Dense(6)(nn.tanh(nn.Dense(8)(nn.LayerNorm()(h))))
        return nn.Dense(10)(h.mean(axis=1))


class Recurrent(nn.Module):
    """A simple recurrent network over the rows of an image."""

    @nn.compact
    def __call__(self, x):
        states: Any = nn.RNN(nn.SimpleCell(8))(x[..., 0])
        return nn.Dense(10)(states[:, -1])


MODELS: dict[str, nn.Module] = {
    "convolutions, mean": Convolutional(),
    "convolutions, flattened": Convolutional(flatten=True),
    "attention": Attention(),
    "recurrent": Recurrent(),
}


def main(arguments: Sequence[str]) -> None:
    """Measures all models and methods, prints the table and writes it down."""
    parser = options("sharing", __doc__, data=False, out=RESULTS / "sharing.json")
    parser.add_argument("--steps", type=positive_int, default=100, help="Adam steps before (100)")
    given, console = parser.parse_args(arguments), make_console()
    rows: list[Row] = []
    for name, module in MODELS.items():
        with console.status(f"{name}: training and forming the blocks"):
            rows += measure(name, module, given.steps, given.seed)
    console.print(_table(rows))
    write_rows(given.out, "sharing", arguments, rows)
    console.print(f"written to {given.out}")


def measure(name: str, module: nn.Module, steps: int, seed: int) -> list[Row]:
    """All methods on one model, a little trained."""
    images, labels = _digits()
    params = module.init(jax.random.key(seed), images[:1])
    loss = kfgn.losses.softmax_cross_entropy_with_integer_labels
    objective = kfgn.Objective(module.apply, loss)
    adam = with_gradient("adam", objective, optax.adam(1e-2))

    def batch_of(k: jax.Array) -> Any:
        start = (k * 64) % (len(images) - 64)
        return tuple(jax.lax.dynamic_slice_in_dim(a, start, 64) for a in (images, labels))

    params = trained(adam, params, batch_of, steps)
    rows = []
    for examples in (1, 64):
        batch = images[:examples], labels[:examples]
        exact = jax.jit(kfgn.gauss_newton(objective).blocks)(params, batch)
        layers = kfgn.layers.find_blocks(objective, params, batch).layers
        for label, chosen in METHODS.items():
            function = kfgn.value_grad_and_curvature(objective, **chosen)
            factors = jax.jit(lambda p, b, f=function: f(p, b)[1].factors)(params, batch)
            for layer, block in exact.items():
                shared = sum(use.form.positions for use in layers[layer].uses.values()) > 1
                if layers[layer].kind in ("dense", "conv") and shared:
                    product = jnp.kron(*factors[layer])
                    distance = jnp.linalg.norm(product - block) / jnp.linalg.norm(block)
                    rows.append(Row(name, examples, layer, label, float(distance)))
    return rows


def _digits() -> tuple[jax.Array, jax.Array]:
    data = load("digits")
    labels = data.train_labels
    images = np.asarray(data.train).reshape(-1, 8, 8, 1)
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels)


def _table(rows: list[Row]) -> Table:
    groups: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row.model, row.layer, row.examples), {})[row.method] = row.distance
    lines = [
        [model, layer.removeprefix("params/"), examples, *(f"{found[m]:.2f}" for m in METHODS)]
        for (model, layer, examples), found in groups.items()
    ]
    columns = ("model", "layer", "examples", *METHODS)
    return table("distance from the exact block", columns, lines)
