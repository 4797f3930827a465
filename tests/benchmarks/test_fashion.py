"""The Fashion-MNIST experiment, run for real on scikit-learn's digits in the images' place."""

import json
import math

import pytest

from benchmarks import datasets
from benchmarks.__main__ import main
from benchmarks.datasets import DataError, load
from benchmarks.experiments import fashion
from benchmarks.experiments.fashion import depth, training
from benchmarks.experiments.fashion.hessian_free import PRECONDITIONERS
from benchmarks.harness.record import write_json

# optax's Adam raises a float to an integer power, which strict promotion forbids.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.loose_dtypes]

SMALL = [
    "--images", "300", "--batch-size", "100", "--iterations", "4", "--hidden", "1", "--width", "6",
    "--seconds", "0.05", "--depths", "2", "--updates", "4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def digits_for_fashion(monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda name, **_: load("digits"))


@pytest.fixture
def fewer_methods(monkeypatch):
    """Spares the test what takes longest: one method for all that are like it, plots at the end."""
    figures = fashion.all_figures
    monkeypatch.setattr(
        fashion, "all_figures", lambda found: figures(found) if found.depths else {}
    )
    monkeypatch.setattr(fashion, "KRONECKER", ("KFRA",))
    monkeypatch.delitem(PRECONDITIONERS, "diagonal")
    monkeypatch.setattr(depth, "METHODS", ("Adam", "L-BFGS-B", "KFRA"))


def measured(folder):
    return json.loads((folder / "results.json").read_text())["measured"]


def test_a_small_run_leaves_results_tables_and_plots(tmp_path, capsys, fewer_methods):
    assert main(["fashion", *SMALL, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["settings"]["images"] == 300
    found = report["measured"]
    runs = {run["method"]: run for run in found["networks"]["1"]}
    assert {
        "NLCG",
        "L-BFGS-B",
        "KFRA",
        "HF, none",
        "HF, Kronecker",
        "Adam",
    } <= runs.keys()
    for run in runs.values():
        seconds = [point["seconds"] for point in run["points"]]
        assert seconds == sorted(seconds) and seconds[0] == 0
        start, end = run["points"][0], run["points"][-1]
        # How far the others come in their time depends on the machine.
        assert end["iteration"] > 0 and end["objective"] is not None
        if run["method"] in ("GD, 0.1", "NLCG", "L-BFGS-B"):
            assert end["objective"] < start["objective"]
        assert 0 <= end["dev_accuracy"] <= 1 and 0 <= end["train_accuracy"] <= 1
    assert runs["L-BFGS-B"]["points"][-1]["iteration"] == 4
    for name in ("none", "Kronecker"):
        run = runs[f"HF, {name}"]
        assert len(run["cg_iterations"]) == run["points"][-1]["iteration"] > 0
        assert all(len(place[name]) == 4 for place in found["conditioned_cg_iterations"].values())
    assert len(found["gaps"]) == 4 and found["repeated_images"] == 0
    (depth,) = found["depths"]
    assert len(depth["relative_gradients"]) == 3 and depth["relative_gradients"][-1] == 1
    assert [run["method"] for run in depth["runs"]] == ["Adam", "L-BFGS-B", "KFRA"]
    assert "Kronecker" in (tmp_path / "table.txt").read_text()
    assert "KFRA" in capsys.readouterr().out
    for plot in ("1_hidden.png", "gaps.png", "cg_iterations.png", "depth.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion, "minimize", interrupted)
    assert main(["fashion", *SMALL, "--out", str(tmp_path)]) == 130
    assert len(measured(tmp_path)["networks"]["1"]) == 2  # gradient descent, at two rates


def test_the_papers_methods_alone_on_its_data_are_timed_without_compiling(tmp_path):
    assert main(["fashion", *SMALL, "--paper-only", "--out", str(tmp_path)]) == 0
    found = measured(tmp_path)
    assert len(found["networks"]["1"]) == 4 and not found["depths"]
    for run in found["networks"]["1"]:
        assert run["points"][-1]["seconds"] < 1 and run["compile_seconds"] >= 0


def test_the_time_of_the_first_iteration_is_taken_for_that_of_the_others():
    point = training.Point(0, 0.0, 3.0, 3.0, 0.1, 3.0, 0.1)
    points = [point, *(point._replace(iteration=k, seconds=9.0 + k) for k in (1, 2, 3))]
    run = training.Run("cg", points)
    run = training._without_compiling(run, [0.0, 10.0, 11.0, 12.0])
    assert run.column("seconds") == [0.0, 1.0, 2.0, 3.0] and run.compile_seconds == 9.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "350"], "--images must be a multiple of --batch-size 100"),
        (["--images", "1600"], "at most 1500"),
        (["--iterations", "0"], "--iterations"),
        (["--seconds", "-1"], "--seconds"),
        (["--hidden", "1,x"], "--hidden"),
        (["--seed", "-1"], "--seed"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_a_bad_command_line_is_one_clear_line(tmp_path, capsys, arguments, message):
    assert main(["fashion", *SMALL, "--out", str(tmp_path / "new"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_read_and_a_folder_that_cannot_be_made_are_one_line(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    assert main(["fashion", *SMALL, "--out", str(tmp_path / "file" / "new")]) == 2
    assert "cannot write" in capsys.readouterr().err

    def unreadable(name, **_):
        raise DataError(f"{name}: no such file")

    monkeypatch.setattr(datasets, "load", unreadable)
    assert main(["fashion", *SMALL, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: fashion_mnist: no such file\n"


def test_a_run_that_diverges_has_no_numbers_that_json_lacks(tmp_path):
    run = training.Run("sgd")
    run.points.append(training.Point(1, 1.0, math.nan, math.inf, 0.1, math.nan, 0.1))
    write_json(tmp_path / "run.json", run.report())
    (point,) = json.loads((tmp_path / "run.json").read_text())["points"]
    assert point["objective"] is point["train_loss"] is point["dev_loss"] is None
    assert point["seconds"] == 1.0
