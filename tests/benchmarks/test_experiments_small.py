"""The small experiments, run whole with tiny settings."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from benchmarks import BenchmarkError
from benchmarks.__main__ import main

pytestmark = pytest.mark.loose_dtypes  # optax's line searches

PNG = b"\x89PNG\r\n"
PLOTS = {
    "rosenbrock": ("paths", "convergence"),
    "logistic": ("losses_centered", "losses_shifted", "boundaries_centered", "boundaries_shifted"),
    "curvature": ("layers", "network"),
    "poisson": ("errors",),
}


def run(folder, name, *arguments):
    """An experiment's results, after a look at everything else that it writes."""
    assert main([name, *map(str, arguments), "--out", str(folder)]) == 0
    report = json.loads((folder / "results.json").read_text())
    assert report["command"].startswith(f"python -m benchmarks {name} ")
    assert {"jax", "kfgn", "settings", "measured"} <= set(report)
    assert (folder / "table.txt").read_text().strip()
    for plot in PLOTS[name]:
        assert (folder / f"{plot}.png").read_bytes().startswith(PNG)
    return report["measured"]


def test_rosenbrock(tmp_path):
    """Newton's and Gauss and Newton's iterations end in the minimum, gradient descent's do not."""
    found = {row["method"]: row for row in run(tmp_path, "rosenbrock", "--iterations", 200)}
    for name in ("Newton", "Newton, line search", "Gauss-Newton"):
        assert found[name]["reached"] and found[name]["iterations"] < 30
        np.testing.assert_allclose(found[name]["final_point"], [1, 1], atol=1e-10)
    assert found["Newton, line search"]["order"] > 1.7
    assert found["Newton, line search"]["highest_value"] < 15 < found["Newton"]["highest_value"]
    assert found["Gauss-Newton"]["iterations"] == 2
    slow, searched = found["gradient"], found["gradient, line search"]
    assert not slow["reached"] and slow["iterations"] == searched["iterations"] == 200
    assert searched["final_value"] < slow["final_value"] < slow["highest_value"]


def test_rosenbrock_elsewhere(tmp_path):
    """Another function from another start, with steps that are too long for gradient descent."""
    arguments = ("--a", -0.5, "--b", 3, "--start", 2, -1, "--step", 1, "--iterations", 50)
    found = {row["method"]: row for row in run(tmp_path, "rosenbrock", *arguments)}
    np.testing.assert_allclose(found["Newton"]["final_point"], [-0.5, 0.25], atol=1e-8)
    assert found["gradient"]["final_value"] is None


def test_logistic(tmp_path):
    """Fixed batches are the full objective; reshuffled ones stop scipy's solvers early."""
    arguments = ("--points", 80, "--test-points", 20, "--batches", 4, "--runs", 1)
    measured = run(tmp_path, "logistic", *arguments, "--iterations", 40)
    assert len(measured) == 2
    for outcomes in measured.values():
        last = {(o["sampling"], o["solver"]): o for o in outcomes}
        best = last["full", "Newton, search"]["losses"][-1]
        for solver in ("Newton, search", "Newton, unit", "L-BFGS", "NLCG"):
            fixed, full = last["fixed", solver], last["full", solver]
            np.testing.assert_allclose(fixed["losses"][-1], best, atol=1e-4)
            np.testing.assert_allclose(full["losses"][-1], best, atol=1e-4)
            assert fixed["train_accuracy"] > 0.7
        assert last["fixed", "Newton, short"]["losses"][-1] > best + 0.01
        assert ("each value", "Newton, search") not in last
        for solver in ("L-BFGS", "NLCG"):
            assert last["each value", solver]["losses"][-1] > best
            assert len(last["each value", solver]["losses"]) < 30


def test_curvature(tmp_path):
    """Negative blocks in a smooth network alone, and negative directions in both."""
    arguments = ("--transfers", "tanh,leaky", "--layers", "4,3", "--updates", 30, "--looks", 3)
    measured = run(tmp_path, "curvature", *arguments, "--examples", 40, "--batch-size", 20)
    for name, looks in measured.items():
        assert looks[0]["update"] == 0 and looks[-1]["update"] == 30
        assert looks[-1]["loss"] < looks[0]["loss"]
        assert all(look["least"] < 0 < look["negative"] for look in looks)
        for look in looks:
            hidden = [look["layers"][f"layer {k}"] for k in (1, 2)]
            if name == "tanh":
                assert all(x["negative_share"] > 0 for x in hidden)
                assert all(x["term_negative_share"] > 0 < x["term_norm"] for x in hidden)
                continue
            assert look["trace"] > 0
            for layer in look["layers"].values():
                assert layer["negative_share"] == layer["term_norm"] == 0
                assert layer["least"] > -1e-14 * layer["greatest"]


def test_poisson(tmp_path):
    """KFLR solves the equation roughly in a hundred updates."""
    arguments = ("--seeds", 1, "--width", 12, "--points", 60, "--seconds", 2, "--goal", 0.1)
    found = {row["method"]: row for row in run(tmp_path, "poisson", *arguments)}
    assert len(found) == 5 and found["kflr"]["error"] < 0.1 and found["kflr"]["updates"] < 200
    assert all(row["points"][0][0] == 10 and row["compile_seconds"] > 0 for row in found.values())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rosenbrock", ["--b", "0"], "--b: must be a number above zero, not '0'"),
        ("rosenbrock", ["--start", "1", "x"], "--start: must be a finite number, not 'x'"),
        ("rosenbrock", ["--steps", "1"], "unrecognized arguments: --steps 1"),
        ("logistic", ["--points", "100"], "--batches of --batch-size points"),
        ("logistic", ["--batch-size", "7"], "--points must be a multiple of --batch-size"),
        ("logistic", ["--seed", "-1"], "argument --seed: must be a whole number from 0"),
        (
            "curvature",
            ["--transfers", "tanh,step"],
            "no transfer 'step'; did you mean",
        ),
        ("curvature", ["--examples", "2000"], "digits has 1500 images, fewer than a batch: 2000"),
        ("curvature", ["--seed", "-1"], "argument --seed: must be a whole number from 0"),
        ("mixture", ["--methods", "kfacs"], "no method 'kfacs'; did you mean 'kfac'"),
        ("mixture", ["--presets", "papers"], "no preset 'papers'; did you mean 'paper'"),
    ],
)
def test_bad_command_lines(name, arguments, message):
    with pytest.raises(BenchmarkError, match=message):
        importlib.import_module(f"benchmarks.experiments.{name}").main(arguments)
