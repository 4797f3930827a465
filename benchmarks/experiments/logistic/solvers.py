"""Solvers of the logistic regression, on batches that are fixed or drawn anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import io_callback

import kfgn
from benchmarks.harness.batches import draw_batches
from benchmarks.harness.measures import iterations_to_tolerance
from benchmarks.harness.optimizers import with_gradient

MINIMIZERS = {"NLCG": "cg", "L-BFGS": "l-bfgs-b"}
SEARCH_STEPS = 20  # of Newton's line search, at most

Data = tuple[np.ndarray, np.ndarray]


class Points(NamedTuple):
    """Points of the plane `[n, 2]` with labels `[n, 1]`, to train on and to classify."""

    train: Data
    test: Data


@dataclass(frozen=True)
class Outcome:
    """What one run came to; losses are those of all training points, by iteration."""

    sampling: str
    solver: str
    seed: int
    losses: np.ndarray
    params: dict[str, np.ndarray]
    train_accuracy: float
    test_accuracy: float
    iterations_of_equation_29: int | None
    seconds: float  # compilation and all
    milliseconds: float | None  # an iteration, after the first
    message: str

    @property
    def iterations(self) -> int:
        return len(self.losses) - 1

    def report(self) -> dict[str, Any]:
        """For JSON."""
        params = {name: np.asarray(leaf).tolist() for name, leaf in self.params.items()}
        return {**vars(self), "losses": self.losses.tolist(), "params": params}


class Draws:
    """The batches of one run, as places among the points; scipy's evaluations ask for them."""

    def __init__(self, count: int, size: int, sampling: str, batches: int, seed: int) -> None:
        whole = sampling in ("full", "fixed")
        if sampling == "full":
            self._pairs = draw_batches(np.arange(count), strategy="full")
        else:
            self._pairs = draw_batches(
                np.arange(count),
                size,
                strategy="fixed" if whole else "reshuffled",
                repeats=count // size if whole else batches,
                seed=seed,
            )
        self.advance()

    def advance(self) -> None:
        self.current = next(self._pairs)[0]

    def anew(self) -> np.ndarray:
        """The current places; other ones next time."""
        found = self.current
        self.advance()
        return found


class Solvers:
    """All solvers on one set of points, from zero."""

    def __init__(self, points: Points, given: Any) -> None:
        self.points, self.given = points, given
        self.objective = kfgn.Objective(
            lambda p, x: x @ p["w"] + p["b"], kfgn.losses.sigmoid_binary_cross_entropy
        )
        self.start = {"w": jnp.zeros((2, 1)), "b": jnp.zeros(1)}
        self._losses = jax.jit(jax.vmap(self.objective, (0, None)))

    def names(self, sampling: str) -> list[str]:
        """Newton's steps are of one batch each: it makes no other evaluations."""
        newton = [] if sampling == "each value" else list(self.newtons())
        return [*newton, *MINIMIZERS]

    def newtons(self) -> dict[str, Any]:
        objective = self.objective
        search = optax.scale_by_zoom_linesearch(SEARCH_STEPS, initial_guess_strategy="one")
        return {
            "Newton, search": optax.chain(kfgn.solvers.newton(objective), search),
            "Newton, unit": kfgn.solvers.newton(objective),
            "Newton, short": kfgn.solvers.newton(objective, self.given.newton_step),
        }

    def run(self, sampling: str, solver: str, seed: int) -> Outcome:
        count, given = len(self.points.train[0]), self.given
        draws = Draws(count, given.batch_size, sampling, given.batches, seed)
        began = time.perf_counter()
        solve = self._minimize if solver in MINIMIZERS else self._newton
        path, times, message = solve(solver, sampling, draws)
        seconds = time.perf_counter() - began
        losses = np.asarray(self._losses(_stacked(path), self.points.train))
        later = np.diff(times[1:]) if len(times) > 2 else None
        return Outcome(
            sampling,
            solver,
            seed,
            losses,
            path[-1],
            _accuracy(path[-1], self.points.train),
            _accuracy(path[-1], self.points.test),
            iterations_to_tolerance(losses, given.epsilon),
            seconds,
            None if later is None else 1000 * float(np.median(later)),
            message,
        )

    def _minimize(self, solver: str, sampling: str, draws: Draws) -> tuple[list, list, str]:
        """scipy's solver; a batch that is drawn anew comes from inside of the objective."""
        shape = jax.ShapeDtypeStruct(draws.current.shape, draws.current.dtype)
        each = sampling == "each value"

        def objective(params, data):
            places = io_callback(draws.anew if each else lambda: draws.current, shape)
            return self.objective(params, jax.tree.map(lambda a: a[places], data))

        path, times = [self.start], [time.perf_counter()]

        def notice(params, _):
            path.append(params)
            times.append(time.perf_counter())
            if not each:
                draws.advance()

        train = jax.tree.map(jnp.asarray, self.points.train)
        found = kfgn.solvers.minimize(
            objective,
            self.start,
            train,
            MINIMIZERS[solver],
            max_iterations=self.given.iterations,
            callback=notice,
        )
        return path, times, found.message

    def _newton(self, solver: str, sampling: str, draws: Draws) -> tuple[list, list, str]:
        """Newton's steps until eq. (29) holds for the values that it sees."""
        init, step = self._step(solver)
        params, state, values = self.start, init(self.start), []
        path, times = [params], [time.perf_counter()]
        for _ in range(self.given.iterations):
            batch = jax.tree.map(lambda a: a[draws.current], self.points.train)
            params, state, value = step(params, state, batch, jax.random.key(0))
            values.append(float(value))
            if len(values) > 1 and abs(values[-1] - values[-2]) <= self.given.epsilon:
                return path, times, "the value changed by no more than epsilon"
            path.append(params)
            times.append(time.perf_counter())
            draws.advance()
        return path, times, "the greatest number of iterations was reached"

    @cache  # noqa: B019 - one compilation for all runs; the solvers live as long as the experiment
    def _step(self, solver: str) -> tuple[Callable, Callable]:
        made = with_gradient(solver, self.objective, self.newtons()[solver])
        return made.init, jax.jit(made.step)


def _stacked(path: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


def _accuracy(params: dict[str, Any], data: Data) -> float:
    logits = data[0] @ np.asarray(params["w"]) + np.asarray(params["b"])
    return float(np.mean((logits > 0) == (data[1] > 0.5)))
