"""``python -m benchmarks surface``: the error surface of a toy network, and its curvature.

A network of two layers and squared error, E along two random directions U, V: both within the
first layer's weights, both within the second's, or one in each (Botev et al., 2.2.3 and appendix
F). With a piecewise linear transfer function no point where E is smooth has a negative eigenvalue
in the planes within a layer; across layers it has saddles, but no negative trace, so that maxima
are sharp: they lie on the ridges where a unit changes its regime. With tanh there are negative
eigenvalues within the first layer, too, and smooth maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness.arguments import options, positive_int, positive_number
from benchmarks.harness.display import table
from benchmarks.harness.experiment import experiment

TRANSFERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky": lambda x: jnp.maximum(0.1 * x, x),
    "tanh": jnp.tanh,
}
# Where the two directions lie: in the first or the second layer's weights.
PLANES = {"within the first layer": (0, 0), "within the second": (1, 1), "across both": (0, 1)}
ROUNDING = 1e-10  # of an eigenvalue in float64, beside the largest of the plane


class Surface(NamedTuple):
    """E over one plane, `[points, points]`, and its Hessian in the two directions."""

    error: np.ndarray
    least: np.ndarray  # eigenvalue
    trace: np.ndarray

    def shares(self) -> dict[str, float]:
        """The parts of the points with a negative eigenvalue, and with a negative trace."""
        scale = ROUNDING * np.abs(self.trace).max()
        return {
            "negative eigenvalue": float(np.mean(self.least < -scale)),
            "negative trace": float(np.mean(self.trace < -scale)),
            "least eigenvalue": float(self.least.min()),
            "least trace": float(self.trace.min()),
        }


def main(arguments: Sequence[str]) -> None:
    """Evaluates all surfaces and writes the table and the figure."""
    parser = options("surface", __doc__, data=False)
    add = parser.add_argument
    add("--inputs", type=positive_int, default=4, help="of the network (4)")
    add("--units", type=positive_int, default=6, help="hidden (6)")
    add("--examples", type=positive_int, default=20, help="(20)")
    add("--points", type=positive_int, default=121, help="of each axis (121)")
    add("--reach", type=positive_number, default=2.0, help="coordinates up to this (2)")
    given, found = parser.parse_args(arguments), {}
    with (
        experiment("surface", arguments, given, len(TRANSFERS) * len(PLANES)) as run,
        jax.enable_x64(True),
    ):
        for name, transfer in TRANSFERS.items():
            for plane, layers in PLANES.items():
                found[name, plane] = _surface(transfer, layers, given)
                run.tick(f"{name}, {plane}")
        measured = {f"{name}: {plane}": s.shares() for (name, plane), s in found.items()}
        run.record(measured, [_table(found)], {"surfaces": _plot(found, given.reach)})


def _surface(transfer: Callable[..., Any], layers: tuple[int, int], given: Any) -> Surface:
    """E, and its Hessian by automatic differentiation, over a plane through the origin."""
    keys = jax.random.split(jax.random.key(given.seed), 6)
    inputs = jax.random.normal(keys[0], (given.examples, given.inputs))
    targets = jax.random.normal(keys[1], (given.examples, 1))
    shapes = (given.inputs, given.units), (given.units, 1)
    # Where only one layer moves the other has to be somewhere.
    base = [jax.random.normal(key, s) for key, s in zip(keys[2:4], shapes, strict=True)]
    directions = [
        jax.random.normal(key, shapes[k]) for key, k in zip(keys[4:], layers, strict=True)
    ]

    def error(place: jax.Array) -> jax.Array:
        weights = list(base)
        for k in set(layers):
            weights[k] = jnp.zeros(shapes[k])
        for coordinate, direction, k in zip(place, directions, layers, strict=True):
            weights[k] = weights[k] + coordinate * direction
        outputs = transfer(inputs @ weights[0]) @ weights[1]
        return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))

    # Irrational steps: no point of the grid lies on a ridge.
    axis = given.reach * (jnp.linspace(-1, 1, given.points) + 1e-3 * jnp.sqrt(2.0))
    places = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)

    @jax.jit
    def evaluate(places):
        hessians = jax.lax.map(jax.hessian(error), places, batch_size=1000)
        values = jnp.linalg.eigvalsh(hessians)
        return jax.lax.map(error, places, batch_size=1000), values[:, 0], values.sum(axis=1)

    shape = (given.points, given.points)
    return Surface(*(np.asarray(x).reshape(shape) for x in evaluate(places)))


def _table(found: dict[tuple[str, str], Surface]) -> Any:
    lines = []
    for (name, plane), surface in found.items():
        shares = surface.shares()
        lines.append([f"{name}, {plane}", f"{shares['negative eigenvalue']:.1%}",
                      f"{shares['negative trace']:.1%}", f"{shares['least eigenvalue']:.2e}",
                      f"{shares['least trace']:.2e}"])  # fmt: skip
    columns = ["plane", "negative eigenvalue", "negative trace", "least eigenvalue", "least trace"]
    return table("The Hessian in the plane, over all of its points", columns, lines)


def _plot(found: dict[tuple[str, str], Surface], reach: float) -> Figure:
    figure = Figure(figsize=(11, 3.4 * len(TRANSFERS)), layout="constrained")
    places = iter(range(1, len(found) + 1))
    for (name, plane), surface in found.items():
        axes: Any = figure.add_subplot(len(TRANSFERS), len(PLANES), next(places), projection="3d")
        axis = np.linspace(-reach, reach, len(surface.error))
        x, y = np.meshgrid(axis, axis, indexing="ij")
        axes.plot_surface(x, y, surface.error, cmap="viridis", rcount=60, ccount=60, linewidth=0)
        axes.set_title(f"{name}, {plane}", fontsize=9)
        axes.view_init(35, -60)
    figure.suptitle("Error of a network of two layers along two random directions")
    return figure
