"""What an update costs each device of a mesh, from shapes: FLOPs, bytes sent, bytes kept."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from kfgn.base.types import Shape
from kfgn.diagnostics.text import bytes_text, flops_text


class PerDevice(NamedTuple):
    """Of data-parallel training, the batch spread over all devices.

    Sums over examples are all-reduced; with `factor_sharding` over all devices, those of one shape
    are inverted in shares, and directions gathered.

    >>> import io, jax, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> batch, mesh = (jnp.ones((8, 3)), jnp.ones((8, 2))), jax.sharding.AbstractMesh((8,), ("d",))
    >>> found = kfgn.inspect(objective, jnp.ones((3, 2)), batch, mesh=mesh, file=io.StringIO())
    >>> found.per_device.gradient_bytes, found.per_device.factor_bytes  # 3 x 2; 3 x 3 and 2 x 2
    (24, 52)
    """

    devices: int
    flops: dict[str, int]  # by method: gradient and factors of its examples
    inversion: int  # FLOPs of inverting all factors
    inversion_of_share: int
    gradient_bytes: int  # all-reduced at every update
    factor_bytes: int  # all-reduced at updates that observe the factors
    direction_bytes: int  # gathered at every update with factor_sharding
    state_bytes: int  # of all factors and inverses
    state_bytes_of_share: int

    def __str__(self) -> str:
        flops = ", ".join(f"{name} {flops_text(n)}" for name, n in self.flops.items())
        return "\n".join([
            f"of {self.devices} devices each, gradient and factors: {flops}",
            f"all-reduced: {bytes_text(self.gradient_bytes)} of gradient at every update, "
            f"{bytes_text(self.factor_bytes)} of factors where they are observed",
            f"inversion {flops_text(self.inversion)}, state {bytes_text(self.state_bytes)}; with "
            f"factor_sharding {flops_text(self.inversion_of_share)}, "
            f"{bytes_text(self.state_bytes_of_share)}, and "
            f"{bytes_text(self.direction_bytes)} of directions gathered",
        ])  # fmt: skip


def per_device(
    rows: Sequence[Any], totals: Any, shapes: dict[str, Shape], devices: int, itemsize: int
) -> PerDevice:
    """The costs, from those of `kfgn.inspect` for one device."""
    alike = Counter((row.activation, row.pre_activation, row.bytes, row.inversion) for row in rows)
    share = [(-(-count // devices), *key) for key, count in alike.items()]
    state = sum(row.bytes for row in rows)
    return PerDevice(
        devices,
        {name: -(-(totals.gradient + n) // devices) for name, n in totals.flops.items()},
        totals.inversion,
        sum(n * inversion for n, *_, inversion in share),
        gradient_bytes=itemsize * sum(map(math.prod, shapes.values())),
        factor_bytes=state,
        direction_bytes=itemsize
        * sum(math.prod(shapes[name]) for row in rows for name in row.parameters),
        state_bytes=2 * state,
        state_bytes_of_share=2 * sum(n * size for n, _, _, size, _ in share),
    )
