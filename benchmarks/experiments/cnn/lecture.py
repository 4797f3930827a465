"""The convolutional network, its objectives and the optimizers that `cnn` compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import kfgn
from benchmarks.harness.optimizers import Optimizer, on_batch, second_order, with_curvature
from benchmarks.harness.timing import compiled

PyTree = Any
CLASSES = 10
WINDOWS = (5, 3, 3)
MOMENTUM = 0.9
RATES = {"momentum": (0.001, 0.003, 0.01, 0.03, 0.1), "adam": (0.001, 0.003, 0.01, 0.03)}
METHODS = ("newton", "kflr", "kfra", "momentum", "adam")
LOSSES = ("squared", "cross_entropy")
SUFFICIENT_DECREASE = 1e-4


class Network(nn.Module):
    """Three convolutions, each with ReLU and 2x2 max-pooling, and a dense layer."""

    channels: Sequence[int]

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.he_normal()
        for channels, window in zip(self.channels, WINDOWS, strict=True):
            x = pooled(nn.relu(nn.Conv(channels, (window, window), kernel_init=start)(x)))
        return nn.Dense(CLASSES, kernel_init=start)(x.reshape(len(x), -1))


def pooled(x: jax.Array) -> jax.Array:
    """The maximum of every 2x2 window; odd sides get a row of zeros, which ReLU makes harmless.

    Written with reshape: on CPUs XLA takes several times longer over `flax.linen.max_pool`.
    """
    count, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    split = (count, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return x.reshape(split).max(axis=(2, 4))


class Problem(NamedTuple):
    """An objective, as kfgn minimizes it, and what it is in the lecture's units."""

    objective: kfgn.Objective
    scale: float  # the lecture's f is so many times the objective

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Labels as the loss takes them."""
        if self.objective.loss is kfgn.losses.half_squared_error:
            return np.eye(CLASSES, dtype=np.float32)[labels]
        return labels


def problem(loss: str, network: Network, c: float) -> Problem:
    """f = |θ|² / 2C + the mean loss.

    The lecture's squared loss has no half and kfgn's has: half of all of f is minimized then.
    """
    if loss == "squared":
        half = kfgn.Objective(network.apply, kfgn.losses.half_squared_error, l2=0.5 / c)
        return Problem(half, 2.0)
    softmax = kfgn.losses.softmax_cross_entropy_with_integer_labels
    return Problem(kfgn.Objective(network.apply, softmax, l2=1 / c), 1.0)


class Method:
    """An optimizer: its batch size, its start, its step, and the programs compiled so far.

    Step sizes of first-order methods are an argument, so that one program serves them all.
    """

    def __init__(
        self,
        name: str,
        batch_size: int,
        init: Callable[[PyTree], PyTree],
        step: Callable[[PyTree, PyTree, PyTree, Any], tuple[PyTree, PyTree]],
        inside: Callable[[PyTree], dict[str, float]] = lambda state: {},
        rates: Sequence[float | None] = (None,),
    ) -> None:
        self.name, self.batch_size, self.inside, self.rates = name, batch_size, inside, rates
        self.init, self._step = jax.jit(init), step
        self._programs: dict[Any, tuple[Any, float]] = {}

    def program(self, *arguments: Any) -> tuple[Any, float]:
        """The step compiled for such arguments, and the seconds that took."""
        shapes = str(jax.tree.map(jnp.shape, arguments))
        if shapes not in self._programs:
            self._programs[shapes] = compiled(self._step, *arguments)[:2]
        return self._programs[shapes]


def methods(
    chosen: Sequence[str],
    task: Problem,
    params: PyTree,
    batch: PyTree,
    fractions: Sequence[float],
    batch_sizes: tuple[int, int],
) -> list[Method]:
    """The chosen methods; `batch` is all of the data, `batch_sizes` of first order and kfgn's."""
    images = len(batch[1])
    small, large = (min(size, images) for size in batch_sizes)
    made = []
    for name in chosen:
        if name == "newton":
            made += [newton(task, images, fraction) for fraction in fractions]
        elif name in RATES:
            made.append(first_order(name, task, small))
        else:
            made.append(kronecker(name, task, params, tuple(a[:large] for a in batch), large))
    return made


def newton(task: Problem, images: int, percent: float) -> Method:
    """Subsampled Newton-CG: the gradient of all images, the Gauss-Newton matrix of some.

    Every batch is all of the images in a new order, so that the examples of the matrix, which
    `model_examples` takes evenly spaced, are drawn anew at every iteration.
    """
    examples = max(1, round(images * percent / 100))
    objective = task.objective
    # The method's own units are the lecture's: λ is divided by what f is divided by.
    settings = dict(kfgn.transforms.HESSIAN_FREE_PRESETS["cnn"])
    damping = settings["damping"]
    settings["damping"] = dataclasses.replace(damping, initial=damping.initial / task.scale)
    search = optax.scale_by_backtracking_linesearch(
        20, slope_rtol=SUFFICIENT_DECREASE, decrease_factor=0.5, increase_factor=math.inf
    )
    transformation = optax.chain(
        kfgn.transforms.scale_by_conjugate_gradient(objective, **settings),
        optax.scale(-1.0),
        kfgn.transforms.without_curvature(search),
    )

    def searching(batch: PyTree, value: Any, grads: PyTree) -> dict[str, Any]:
        return {"value": value, "grad": grads, "value_fn": on_batch(objective, batch)}

    # Unused factors are never computed: XLA drops them.
    made = with_curvature(
        "empirical", objective, transformation, searching, model_examples=examples
    )

    def inside(state):
        solved, _, searched = state
        return {
            "cg": int(solved.iterations),
            "damping": float(solved.damping) * task.scale,
            "step": float(searched.learning_rate),
        }

    return Method(f"newton {percent:g}%", images, made.init, _without_rate(made), inside)


def kronecker(name: str, task: Problem, params: PyTree, batch: PyTree, batch_size: int) -> Method:
    """KFLR or KFRA with kfgn's defaults."""
    # The joint recursion has matrices over all channels and positions of an image.
    spatial: dict[str, Any] = {"spatial": "homogeneous"} if name == "kfra" else {}
    made = second_order(name, task.objective, params, batch, {}, **spatial)
    return Method(name, batch_size, made.init, _without_rate(made))


def _without_rate(made: Optimizer) -> Callable[..., tuple[PyTree, PyTree]]:
    """A step that takes a rate, as those of first-order methods do, and draws nothing."""
    return lambda params, state, batch, rate: made.step(params, state, batch, jax.random.key(0))[:2]


def first_order(name: str, task: Problem, batch_size: int) -> Method:
    """SGD with momentum, or Adam, on the lecture's f."""
    scaled = optax.trace(MOMENTUM) if name == "momentum" else optax.scale_by_adam()

    def step(params, state, batch, rate):
        grads = jax.grad(lambda p: task.scale * task.objective(p, batch))(params)
        updates, state = scaled.update(grads, state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), state

    return Method(name, batch_size, scaled.init, step, rates=RATES[name])


def evaluator(task: Problem) -> Callable[..., dict[str, float]]:
    """`(params, train, test) -> ` the lecture's f, its loss part, and the test accuracy."""

    @jax.jit
    def measure(params, train, test):
        images, labels = test
        hits = jnp.argmax(task.objective.model(params, images), axis=1) == labels
        loss = task.scale * task.objective.mean_loss(params, train)
        value = loss + task.scale * task.objective.penalty(params)
        return {"objective": value, "loss": loss, "accuracy": jnp.mean(hits, dtype=jnp.float32)}

    return lambda *arguments: {k: float(v) for k, v in measure(*arguments).items()}
