"""The settings that `grid` trains, and one program for all settings of a method.

The learning rate and the decay period are numbers in the state, so that every setting of a method
runs the same compiled step, one after the other or, on an accelerator, all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.harness.optimizers import FIRST_ORDER, Optimizer, second_order

ADAM_DEFAULT = 1e-3


class Setting(NamedTuple):
    """One optimizer with its hyperparameters; for second order, what differs from the defaults."""

    method: str
    rate: float | None = None
    period: float | None = None  # the part of all updates after which the rate halves
    average: bool = True  # whether second-order factors are moving averages

    @property
    def label(self) -> str:
        """What tables call it."""
        if self.rate is None:
            return self.method if self.average else f"{self.method}, no average"
        rate = "0.001" if self.rate == ADAM_DEFAULT else f"2^{round(jnp.log2(self.rate).item())}"
        halved = "" if self.period == 1 else f", halved each {100 * (self.period or 1):g}%"
        return f"{self.method} {rate}{halved}"


def first_order_settings(
    methods: Sequence[str], exponents: Sequence[int], periods: Sequence[float], stride: int
) -> list[Setting]:
    """The grid, of Adam in full and of others at every `stride`-th rate; and Adam's default."""
    found = []
    for method in methods:
        own = exponents if method == "adam" else exponents[::stride]
        found += [Setting(method, 2.0**-k, period) for k in own for period in periods]
        if method == "adam":
            found.append(Setting(method, ADAM_DEFAULT, 1.0))
    return found


def second_order_settings(methods: Sequence[str]) -> list[Setting]:
    """Default settings, with and without the moving average."""
    return [Setting(method, average=average) for method in methods for average in (True, False)]


class Settled(NamedTuple):
    """The state of a first-order optimizer, its settings included."""

    rate: jax.Array
    period: jax.Array  # updates between two halvings
    inner: Any


def first_order_step(method: str, objective: Any) -> Callable[..., Any]:
    """One step of a method, whatever its settings: they are read from the state."""

    def step(params, state, batch, key):
        del key
        loss, grads = jax.value_and_grad(objective)(params, batch)
        updates, inner = _transformation(method, state.rate, state.period).update(
            grads, state.inner, params
        )
        return optax.apply_updates(params, updates), state._replace(inner=inner), loss

    return step


def _transformation(method: str, rate: Any, period: Any) -> optax.GradientTransformation:
    return FIRST_ORDER[method][0](lambda count: rate * 0.5 ** jnp.floor(count / period))


def first_order_optimizer(setting: Setting, step: Callable[..., Any], updates: int) -> Optimizer:
    """One setting, to be trained for so many updates."""
    return Optimizer(setting.label, lambda params: _start(setting, params, updates), step)


def all_at_once(
    settings: Sequence[Setting], step: Callable[..., Any], updates: int
) -> Optimizer:  # fmt: skip
    """All settings of one method side by side, on the same batches: params `[settings, ...]`."""

    def init(params):
        one = jax.tree.map(lambda a: a[0], params)
        starts = [_start(setting, one, updates) for setting in settings]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    mapped = jax.vmap(step, in_axes=(0, 0, None, None))
    return Optimizer(settings[0].method, init, mapped)


def _start(setting: Setting, params: Any, updates: int) -> Settled:
    assert setting.rate is not None and setting.period is not None
    period = max(1, int(setting.period * updates))
    inner = _transformation(setting.method, setting.rate, period).init(params)
    return Settled(jnp.float32(setting.rate), jnp.float32(period), inner)


def second_order_optimizer(setting: Setting, objective: Any, params: Any, batch: Any) -> Optimizer:
    """KFRA, KFLR or KFAC with default settings, but for the moving average."""
    options = {} if setting.average else {"decay": None}
    made = second_order(setting.method, objective, params, batch, options)
    return Optimizer(setting.label, made.init, made.step)
