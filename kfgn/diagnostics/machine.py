"""How fast a machine is: what `kfgn.inspect` predicts seconds by."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kfgn.base.spd_inverse import spd_inverses
from kfgn.base.types import Array

_SIZE, _NUMBERS, _CALLS, _OPERATIONS = 512, 2**22, 7, 200


class Machine(NamedTuple):
    """What one device does in a second; by default a large accelerator's, as data sheets say.

    >>> import io, jax.numpy as jnp, kfgn
    >>> objective = kfgn.Objective(lambda w, x: x @ w, kfgn.losses.half_squared_error)
    >>> batch, slow = (jnp.ones((8, 3)), jnp.ones((8, 2))), kfgn.diagnostics.Machine(memory=1e3)
    >>> found = kfgn.inspect(objective, jnp.ones((3, 2)), batch, machine=slow, file=io.StringIO())
    >>> found.plan[0].update > 0.1
    True
    """

    products: float = 3e14  # FLOPs of the model's products
    factors: float = 2e13  # FLOPs of products in full float32, which make and apply factors
    inversions: float = 5e12  # d^3 of inverses by Cholesky
    decompositions: float = 5e11  # d^3 of eigendecompositions
    memory: float = 2e12  # bytes read and written
    link: float = 5e10  # bytes sent to another device
    launch: float = 5e-6  # seconds before an operation begins


def measure_machine(mesh: jax.sharding.Mesh | None = None) -> Machine:
    """The rates of the devices here, each of them busy, in a few seconds.

    Args:
      mesh: of the devices, the default device if None. Devices that share cores, as those of
        `--xla_force_host_platform_device_count` do, are each as slow as that makes them.

    Returns:
      The medians of a few calls: products `[512, 512] x [512, 512]`, inverses and
      eigendecompositions of such matrices, a pass over and an all-reduce of 16 MiB, and a chain of
      200 products `[8, 8] x [8, 8]`. Without another device to send to, `link` is the memory's.

    >>> import kfgn
    >>> all(rate > 0 for rate in kfgn.diagnostics.measure_machine())
    True
    """
    if mesh is None:
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("d",))
    axes = tuple(mesh.axis_names)
    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.normal(size=(_SIZE, _SIZE)), jnp.float32) / _SIZE**0.5
    spd, long = square @ square.T + jnp.eye(_SIZE), jnp.ones(_NUMBERS, jnp.float32)

    def chain(x: Array) -> Array:
        return jax.lax.fori_loop(0, _OPERATIONS, lambda _, y: y @ x, x)

    def seconds(function: Callable[[Array], Any], x: Array) -> float:
        return _seconds(function, x, mesh)

    cube, passed = _SIZE**3, 2 * long.nbytes
    memory = passed / seconds(lambda x: 2 * x + 1, long)
    sent = passed * (mesh.size - 1) / mesh.size
    return Machine(
        products=2 * cube / seconds(lambda x: x @ x, square),
        factors=2 * cube / seconds(lambda x: jnp.matmul(x, x, precision="highest"), square),
        inversions=cube / seconds(lambda x: spd_inverses([x], [jnp.zeros(())])[0], spd),
        decompositions=cube / seconds(jnp.linalg.eigh, spd),
        memory=memory,
        link=sent / seconds(lambda x: jax.lax.psum(x, axes), long) if sent else memory,
        launch=seconds(chain, square[:8, :8]) / _OPERATIONS,
    )


def _seconds(function: Callable[[Array], Any], x: Array, mesh: jax.sharding.Mesh) -> float:
    """Of one call on every device at once, the median of a few after one that compiles."""
    everywhere = PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )
    )
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, everywhere))
    times = []
    for _ in range(_CALLS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))
