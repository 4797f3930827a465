"""The experiments of Botev et al. run from their command lines, in small."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.experiments import ablations, cost, mixture, peers, ranks, versus
from benchmarks.experiments.peers import outside
from benchmarks.harness import race

# optax's Adam and L-BFGS promote dtypes.
pytestmark = pytest.mark.loose_dtypes


def measured(folder, *arguments):
    """What a command writes down, which must come with a table and a plot."""
    assert main([*arguments, "--out", str(folder)]) == 0
    assert (folder / "table.txt").read_text().strip()
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    assert list(folder.glob("*.png"))
    report = json.loads((folder / "results.json").read_text())
    assert report["command"].startswith(f"python -m benchmarks {arguments[0]} --")
    return report["measured"]


def test_alignment(tmp_path):
    rows = measured(
        tmp_path, "alignment", "--data", "digits", "--layers", "8,4", "--batches", "20",
        "--probes", "0,1", "--trained-by", "kfra", "--seeds", "2",
    )  # fmt: skip
    assert {(row["update"], row["seed"]) for row in rows} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    first, second = ([row["cosine"] for row in rows if row["seed"] == seed] for seed in (0, 1))
    assert first != second
    assert all(-1.0001 <= row["cosine"] <= 1.0001 for row in rows)
    # At the start the damping dominates, and all directions are near the gradient.
    assert all(row["cosine"] > 0.5 for row in rows if row["layer"] == "whole")


def test_ranks(tmp_path, monkeypatch):
    leaky = "leaky relu, max(0.1 x, x)"
    monkeypatch.setattr(ranks, "ACTIVATIONS", {leaky: ranks.ACTIVATIONS[leaky]})
    found = measured(tmp_path, "ranks", "--layers", "4", "--examples", "1,3", "--depths", "2")
    assert all(row["rank"] <= row["bound"] for row in found["ranks"])
    exact = [row for row in found["ranks"] if row["samples"] == 0]
    assert all(row["rank"] == row["bound"] for row in exact)  # a tanh network loses none
    assert all(row["first_rank"] == 32 for row in found["dead"])


def test_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SWEEPS", {"N": (8, 16), "S": (1, 2)})
    monkeypatch.setattr(cost, "BASE", {"N": 8, "D": 4, "K": 2, "S": 1})
    found = measured(tmp_path, "cost", "--repeats", "1")
    assert {(row["swept"], row["method"]) for row in found["rows"]} >= {
        ("N", "kfra"),
        ("S", "kfac"),
    }
    assert all(row["seconds"] > 0 for row in found["rows"])


def test_mixture(tmp_path):
    found = measured(
        tmp_path, "mixture", "--data", "digits", "--layers", "8,4", "--updates", "10",
        "--adam-updates", "20", "--batch-size", "100", "--exponents", "7",
        "--methods", "kfra,kfac",
    )  # fmt: skip
    presets = {f"{m}{preset}" for m in ("kfra", "kfac") for preset in ("", ", paper", ", fixed")}
    assert presets < set(found)
    for runs in found.values():
        assert all(run["points"][-1][2] < run["points"][0][2] for run in runs)
    # Second order and the best of Adam's two settings train from another start, too.
    assert sorted(map(len, found.values())) == [1] + [2] * 7
    assert found["kfra"][0] != found["kfra"][1]


def test_mixture_is_a_likelihood():
    """Probabilities of both targets sum to one, and are those of eq. (27)."""
    outputs = jnp.asarray([0.3, -1.2, 2.0])
    ones = [jnp.exp(mixture.log_likelihoods(outputs, jnp.asarray(y))) for y in (0.0, 1.0)]
    np.testing.assert_allclose(sum(ones), 1, rtol=1e-6)
    s = jax.nn.sigmoid
    expected = s(0.3) * s(-1.2) + (1 - s(0.3)) * s(2.0)
    np.testing.assert_allclose(ones[1], expected, rtol=1e-6)


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


def test_versus(tmp_path, monkeypatch):
    cases = versus._cases

    def few(options):
        found = cases(options)
        assert len(found) == 9
        return {name: found[name] for name in ("digits, defaults", "digits, 2 samples")}

    monkeypatch.setattr(versus, "_cases", few)
    found = measured(
        tmp_path, "versus", "--data", "digits", "--layers", "8,4", "--updates", "4",
        "--seeds", "2", "--batch-size", "100", "--batches", "50",
    )  # fmt: skip
    plain, sampled = found.values()
    assert plain["kfra"] != plain["kfac"]
    losses = [[point[2] for point in run["kfac"][1]] for run in (plain, sampled)]
    assert losses[0] != losses[1]  # the samples arrive
    for runs in (plain, sampled):
        assert all(points[-1][2] < points[0][2] for points in runs["kfac"] + runs["kfra"])


def test_surface(tmp_path):
    """Section 2.2.3: nothing negative within a layer of ReLUs, and no negative trace anywhere."""
    found = measured(tmp_path, "surface", "--points", "41")
    for name in ("relu", "leaky"):
        for plane in ("within the first layer", "within the second"):
            assert found[f"{name}: {plane}"]["negative eigenvalue"] == 0
        across = found[f"{name}: across both"]
        assert across["negative eigenvalue"] > 0.1
        assert across["negative trace"] == 0
    assert found["tanh: within the first layer"]["negative eigenvalue"] > 0.1
    assert found["tanh: within the second"]["negative eigenvalue"] == 0


def test_ablations(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "METHODS", ("kfra",))
    monkeypatch.setattr(ablations, "_shapes", lambda options: {"batch 50": (options.layers, 50)})
    few = {name: ablations.SETTINGS[name] for name in ("the defaults", "no momentum")}
    monkeypatch.setattr(ablations, "SETTINGS", few)
    found = measured(
        tmp_path, "ablations", "--data", "digits", "--layers", "8,4", "--updates", "4",
        "--seeds", "1", "--batch-size", "100", "--batches", "50",
    )  # fmt: skip
    assert set(found["settings"]) == {f"kfra: {n}" for n in few}
    assert set(found["sizes"]) == {"batch 50"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alignment", "--data", "mnits"], "did you mean 'mnist'"),
        (["alignment", "--probes", "a"], "--probes"),
        (["mixture", "--data", "faces"], "mnist, digits"),
        (["mixture", "--data", "digits", "--batch-size", "5000"], "fewer than a batch"),
        (["peers", "--data", "digits", "--batch-size", "5000"], "fewer than a batch"),
        (["ablations", "--data", "faces"], "faces"),
        (["versus", "--data", "mnits"], "did you mean 'mnist'"),
        (["versus", "--data", "digits", "--batch-size", "5000"], "fewer than a batch"),
        (["grid", "--data", "mnits"], "did you mean 'mnist'"),
        (["grid", "--data", "digits", "--batch-size", "5000"], "fewer than a batch"),
        (["grid", "--methods", "sgd"], "adam"),
        (["grid", "--periods", "2"], "up to 1"),
    ],
)
def test_bad_command_lines(arguments, said, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path), "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
