"""The experiments of Botev et al. run from their command lines, in small."""

from __future__ import annotations

import jax
import pytest

from benchmarks.__main__ import main
from benchmarks.experiments import ablations, cost, plan, ranks, refresh, savings, versus
from tests.benchmarks.measured import measured

pytestmark = pytest.mark.loose_dtypes  # optax's Adam and L-BFGS promote dtypes


def test_alignment(tmp_path):
    looks = measured(
        tmp_path, "alignment", "--data", "digits", "--layers", "8,4", "--batches", "20",
        "--probes", "0,1", "--trained-by", "kfra", "--seeds", "2",
    )  # fmt: skip
    assert {(x["update"], x["seed"]) for x in looks} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    first, second = ([x["cosines"] for x in looks if x["seed"] == seed] for seed in (0, 1))
    assert first != second
    found = [layers for x in looks for by in x["cosines"].values() for layers in by.values()]
    assert all(-1.0001 <= cosine <= 1.0001 for layers in found for cosine in layers.values())
    # At the start the damping dominates, and all directions are near the gradient.
    assert all(layers["whole"] > 0.5 for layers in found if "whole" in layers)


def test_ranks(tmp_path, monkeypatch):
    leaky = "leaky relu, max(0.1 x, x)"
    monkeypatch.setattr(ranks, "ACTIVATIONS", {leaky: ranks.ACTIVATIONS[leaky]})
    trained = ranks.trained  # for as many updates as it takes to be elsewhere
    monkeypatch.setattr(ranks, "trained", lambda *given: trained(*given[:3], min(given[3], 5)))
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


def test_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SWEEPS", {"N": (8,), "devices": ()})
    monkeypatch.setattr(plan, "BASE", {"D": 4, "L": 1, "N": 8, "K": 2, "devices": 1})
    monkeypatch.setattr(plan, "METHODS", ("kfra",))
    found = measured(tmp_path, "plan", "--blocks", "1")
    assert [(row["swept"], row["method"]) for row in found["rows"]] == [
        ("N", "gradient"),
        ("N", "kfra"),
    ]
    assert all(row["measured"] > 0 < row["predicted"] for row in found["rows"])
    off = max(
        x / y
        for row in found["rows"]
        for x, y in [sorted((row["predicted"], row["measured"]), reverse=True)]
    )
    assert max(x["worst"] for x in found["off"].values()) == pytest.approx(off, rel=1e-3)


def test_refresh(tmp_path, monkeypatch):
    """On the one device that there is, and what the table has of more."""
    assert jax.device_count() == 1  # from here on the command cannot make more
    monkeypatch.setattr(refresh, "DEVICES", (1, 2))
    found = measured(tmp_path, "refresh", "--width", "8", "--layers", "1")
    assert [(row["devices"], row["shares"]) for row in found] == [(1, False)]
    assert found[0]["of a device"] == found[0]["cores"]
    rows = [refresh.Row(1, False, 1.0, -1.0), refresh.Row(4, True, 1.0, 2.0)]
    assert rows[1].of_a_device == 0.5
    refresh._plot(rows).savefig(tmp_path / "noise.png")


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


def test_savings(tmp_path, monkeypatch):
    """On one task for both kinds."""
    monkeypatch.setattr(savings, "_residual", lambda given: savings._autoencoder(given, 50))
    found = measured(
        tmp_path, "savings", "--data", "digits", "--layers", "8,4", "--updates", "4",
        "--batches", "20",
    )  # fmt: skip
    assert [run["task"] for run in found] == ["batch 20"] * 3 + ["residual network"] * 3
    assert all(len(run["seconds"]) == 4 and len(run["losses"]) == 2 for run in found)


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
