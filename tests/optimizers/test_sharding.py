"""Factors spread over eight devices: the steps of one, an eighth of the state, and what is sent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import kfgn
from tests.tables.small import OBJECTIVE, make_batch, make_params, make_step

ROOT = Path(__file__).parents[2]


def test_one_process(tmp_path):
    """Steps, shares, what is sent, what `kfgn.inspect` says; on four devices; in shard_map."""
    ends([start("one", str(tmp_path))])


def test_two_processes():
    """Over loopback, by collectives of the CPU, four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    ends([start("two", address, str(k), devices=4) for k in range(2)])


def test_the_state_of_other_devices_is_refused():
    """As one that `jax.shard_map` was told to replicate has it, too."""
    params, batch = make_params(), make_batch()
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    optimizer = kfgn.kfra(OBJECTIVE, params, batch, factor_sharding=sharding)
    state, step = optimizer.init(params), make_step(optimizer)
    jax.eval_shape(step, params, state, batch)
    both = jax.tree.map(
        lambda x: jnp.concatenate([x, x]), optax.tree_utils.tree_get(state, "factors")
    )
    wrong = optax.tree_utils.tree_set(state, factors=both)
    with pytest.raises(kfgn.errors.OptionError, match=r"shape \(2, 5, 5\), expected \(1, 5, 5\)"):
        jax.eval_shape(step, params, wrong, batch)


def start(*arguments: str, devices: int = 8) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    # Threads: with fewer, programs in flight can wait for each other's devices.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "32"}
    command = [sys.executable, "-W", "error", "-m", "tests.optimizers.sharded_run", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def ends(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for all to end well."""
    try:
        for process in processes:
            said, error = process.communicate(timeout=300)
            assert process.returncode == 0, error[-2000:]
            assert said.strip().endswith("done")
    finally:
        for process in processes:
            process.kill()
