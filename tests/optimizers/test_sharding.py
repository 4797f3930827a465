"""Factors spread over eight devices: the steps of one, an eighth of the state, and what is sent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_under_jit_and_resumed_on_four(tmp_path):
    """The recipe: steps, shares, what is sent, what `kfgn.inspect` says, a checkpoint."""
    ends([start("jit", "recipe", str(tmp_path))])


@pytest.mark.parametrize("name, check", [("eigen", "checked"), ("kronecker", "unchecked")])
def test_inside_shard_map(name, check):
    """The search for γ by eigendecompositions; the preconditioner alone."""
    ends([start("shard_map", name, check)])


def test_two_processes():
    """Over loopback, by collectives of the CPU, four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    ends([start("process", address, str(k), devices=4) for k in range(2)])


def start(*arguments: str, devices: int = 8) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error", "-m", "tests.optimizers.sharded_run", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def ends(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for all to end well."""
    try:
        for process in processes:
            said, error = process.communicate(timeout=120)
            assert process.returncode == 0, error[-2000:]
            assert said.strip().endswith("done")
    finally:
        for process in processes:
            process.kill()
