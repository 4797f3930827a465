"""What an update takes in seconds, predicted from shapes and a machine's rates."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from kfgn.curvature.methods import METHODS
from kfgn.diagnostics.costs import LONGEST, REFRESH_EVERY, SHARE
from kfgn.diagnostics.machine import Machine
from kfgn.diagnostics.per_device import PerDevice
from kfgn.diagnostics.text import aligned

# Passes over all parameters that an update makes besides the gradient's three, and operations
# that it starts: so many, and for each block (counted in compiled programs).
_PASSES, _OPERATIONS, _OF_BLOCK = 20, 200, 40


class Plan(NamedTuple):
    """Seconds on each device of an update by one method, and how often to do its dear parts.

    >>> import io, jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> batch, mesh = (jnp.ones((8, 3)), jnp.ones((8, 2))), jax.sharding.AbstractMesh((8,), ("d",))
    >>> found = kfgn.inspect(objective, jnp.ones((3, 2)), batch, mesh=mesh, file=io.StringIO())
    >>> [(p.method, p.inverse, p.shares) for p in found.plan if p.method == "kfac"]
    [('kfac', 'factored', False), ('kfac', 'factored', True), ('kfac', 'ekfac', False)]
    """

    method: str
    inverse: str  # "factored" or "ekfac"
    shares: bool  # with factor_sharding
    gradient: float
    factors: float  # where they are observed, with what is sent
    inversion: float  # where it is due
    rest: float  # direction, quadratic model, passes over the parameters, starts of operations
    sent: float  # at every update
    update: float  # the mean, with factors and inverses every five updates
    longest: float  # one with all that is due
    every: int  # the period at which factors and inverses add at most 0.6 of a gradient

    @property
    def update_auto(self) -> float:
        """The mean with that period."""
        return self.mean(self.every)

    def mean(self, every: int) -> float:
        """Seconds of an update with factors and inverses every so many updates."""
        return self.longest - (self.factors + self.inversion) * (1 - 1 / every)


def plans(blocks: int, totals: Any, costs: PerDevice, machine: Machine) -> tuple[Plan, ...]:
    """For every method; in shares where there are several devices; and for EKFAC."""
    kinds = [("factored", False), ("factored", True), ("ekfac", False)]
    if costs.devices == 1:
        kinds.remove(("factored", True))
    return tuple(_plan(n, *kind, blocks, totals, costs, machine) for n in METHODS for kind in kinds)


def _plan(
    method: str,
    inverse: str,
    shares: bool,
    blocks: int,
    totals: Any,
    costs: PerDevice,
    machine: Machine,
) -> Plan:
    parts = costs.devices
    ring = 2 * (parts - 1) / parts  # of what is all-reduced each device sends so much
    values, weights = totals.values / parts, costs.gradient_bytes
    inverses = (costs.state_bytes_of_share if shares else costs.state_bytes) / 2

    def compute(flops: float, rate: float, numbers: float) -> float:
        # Products and passes over values take turns: the sum is nearer than the larger of both.
        return flops / rate + numbers / machine.memory

    passes = METHODS[method].passes(totals.columns) if METHODS[method].probes else 0
    gradient = compute(totals.gradient / parts, machine.products, 3 * (values + weights))
    factors = totals.flops[method] + totals.waiting[method]
    factors += totals.moments[method] if inverse == "ekfac" else 0
    observed = compute(factors / parts, machine.factors, 2 * (1 + passes) * values + inverses)
    observed += ring * costs.factor_bytes / machine.link
    d3 = costs.inversion_of_share if shares else costs.inversion
    inversion = d3 / (machine.decompositions if inverse == "ekfac" else machine.inversions)
    solve = totals.solve / (parts if shares else 1)
    rest = compute(solve, machine.factors, inverses) + _PASSES * weights / machine.memory
    rest += totals.linear / parts / machine.products + gradient / 15
    rest += (_OPERATIONS + _OF_BLOCK * blocks) * machine.launch
    sent = (ring * weights + shares * ring / 2 * costs.direction_bytes) / machine.link
    longest = gradient + rest + sent + observed + inversion
    every = min(max(math.ceil((observed + inversion) / (SHARE * gradient)), 1), LONGEST)
    found = Plan(
        method, inverse, shares, gradient, observed, inversion, rest, sent, 0.0, longest, every
    )
    return found._replace(update=found.mean(REFRESH_EVERY))


def plan_lines(plan: Sequence[Plan]) -> list[str]:
    """A table of seconds."""
    if not plan:
        return []
    head = "gradient", "factors", "inversion", "rest", "sent", "mean", "longest"
    rows = [["seconds of an update", *head, 'by "auto"', "every"]]
    for found in plan:
        name = found.method + (", ekfac" if found.inverse == "ekfac" else "")
        name += ", factor_sharding" if found.shares else ""
        seconds = [*found[3:8], found.update, found.longest, found.update_auto]
        rows.append([name, *(f"{x:.2g}" for x in seconds), str(found.every)])
    return ["", *aligned(rows, right=9)]
