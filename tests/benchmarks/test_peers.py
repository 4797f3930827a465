"""The comparison with other libraries' optimizers, run in small."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.experiments import peers
from benchmarks.experiments.peers import outside
from benchmarks.harness import race
from tests.benchmarks.measured import measured

pytestmark = pytest.mark.loose_dtypes  # optax's Adam and L-BFGS promote dtypes


def test_peers(tmp_path, monkeypatch):
    one_rate = {name: (make, rates[:1]) for name, (make, rates) in peers.TRIED.items()}
    monkeypatch.setattr(peers, "TRIED", one_rate)
    found = measured(
        tmp_path, "peers", "--data", "digits", "--layers", "8,4", "--seconds", "0.01",
        "--batch-size", "100", "--further", "1", "--no-kfac-jax", "--seeds", "2",
    )  # fmt: skip
    kinds = [name.split()[0] for name in found]
    seeds = {kind: [len(found[n]) for n in found if n.split()[0] == kind] for kind in set(kinds)}
    assert seeds["kfra"] == seeds["l-bfgs"] == [2] and sorted(seeds["adam"]) == [1, 2]
    assert set(kinds) >= {"kfra", "kfac", "adam", "muon", "l-bfgs"}
    # The only rate is at the end of the tried ones: another follows.
    assert kinds.count("adam") == kinds.count("muon") == 2


class _Options:
    batch_size, seconds, l2 = 5, 0.0, 0.0


def test_kfac_jax_runs_outside_or_is_skipped_with_a_reason(tmp_path, monkeypatch):
    """The environment's Python gets the problem; what it says, or why it failed, comes back."""
    params = {"params": {"Dense_1": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)},
                         "Dense_0": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}}  # fmt: skip
    given = np.ones((20, 3), np.float32), params, "half_squared_error", 3.0, 1, _Options, 10
    python = tmp_path / "python"
    monkeypatch.setattr(outside, "environment", lambda: python)

    def answer(script):
        python.write_text(f"#!{sys.executable}\n{script}")
        python.chmod(0o755)

    answer(
        "import json, sys, numpy as np\n"
        "given = np.load(sys.argv[2])\n"
        "assert given['kernel0'].shape == (3, 2) and given['batches'].shape == (3000, 5)\n"
        "said = json.load(open(sys.argv[3]))\n"
        "print('a warning')\n"
        "points = [[said['seed'], 0.0, said['damping']]]\n"
        "print(json.dumps({'points': points, 'versions': {'jax': '1'}}))\n"
    )
    assert outside.kfac_jax_run(*given) == ([race.Point(1, 0.0, 3.0)], {"jax": "1"})
    answer("import sys\nsys.exit('ImportError: no such jax')")
    with pytest.raises(outside.Skipped, match="fails: ImportError: no such jax"):
        outside.kfac_jax_run(*given)
    monkeypatch.undo()
    monkeypatch.setattr(outside, "_call", _no_index)
    with pytest.raises(outside.Skipped, match="cannot be installed: no index"):
        outside.environment(tmp_path / "new")


def _no_index(command, seconds):
    raise subprocess.CalledProcessError(1, command, stderr="first\nno index\n")


def test_peers_go_on_where_kfac_jax_fails(tmp_path, monkeypatch):
    """Where it fails for one seed only, the others' runs count."""
    monkeypatch.setattr(peers, "TRIED", {"adam": (peers.TRIED["adam"][0], (1e-3,))})
    calls = []

    def sometimes(images, params, loss, damping, seed, options, evaluated):
        calls.append((damping, seed))
        if seed == 1:
            raise outside.Skipped("no luck")
        return [race.Point(0, 0.0, 9.0), race.Point(1, 1.0, damping)], {"jax": "1"}

    monkeypatch.setattr(outside, "kfac_jax_run", sometimes)
    arguments = ["peers", "--data", "digits", "--layers", "8,4", "--seconds", "0.01",
                 "--batch-size", "100", "--further", "0", "--seeds", "3"]  # fmt: skip
    found = measured(tmp_path, *arguments)
    assert calls == [(3, 0), (150, 0), (3, 1), (3, 2)]  # the others with the better damping
    assert [len(found[f"kfac-jax, damping {d}"]) for d in (3, 150)] == [2, 1]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({1e-3: 2.0, 3e-3: 1.0, 1e-2: 3.0}, None),
        ({1e-3: 2.0, 3e-3: 1.0}, 9e-3),
        ({1e-3: 1.0, 3e-3: 2.0}, 3e-4),
        ({1e-3: 1.0, 3e-3: math.inf}, 3e-4),
    ],
)
def test_rates_go_on_where_the_best_is_at_the_end(ends, expected):
    assert peers._next_rate(ends) == expected
