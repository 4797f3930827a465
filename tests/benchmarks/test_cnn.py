"""The experiment on convolutional networks, run for real on a few of scikit-learn's digits."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import kfgn
from benchmarks import BenchmarkError
from benchmarks.__main__ import main
from benchmarks.experiments import cnn
from benchmarks.experiments.cnn import lecture

# optax's Adam and line search mix dtypes, which strict promotion forbids.
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.loose_dtypes]

SMALL = ["--data", "digits", "--channels", "2,2,2", "--images", "50", "--batch-size", "10",
         "--kronecker-batch-size", "20", "--seconds", "1000", "--trial-seconds", "0.01",
         "--iterations", "2", "--percent", "20"]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder and the report of a run with every method under one loss, two under the other."""
    folder = tmp_path_factory.mktemp("cnn")
    cnn.main([*SMALL, "--losses", "squared", "--out", str(folder / "all")])
    few = [*SMALL, "--methods", "newton,adam", "--out", str(folder / "few")]
    cnn.main([*few, "--losses", "cross_entropy"])
    return folder


def report(folder):
    return json.loads((folder / "results.json").read_text())


def test_what_is_written(results):
    found = report(results / "all")
    assert found["command"].startswith("python -m benchmarks cnn --data digits")
    assert found["settings"]["c"] == 0.5 and found["settings"]["seed"] == 0
    kinds = [run["method"].split()[0] for run in found["measured"]]
    assert kinds == list(lecture.METHODS)
    table = (results / "all" / "table.txt").read_text()
    assert "digits, squared loss, 50 images" in table
    assert all(run["method"] in table for run in found["measured"])
    for plot in (
        results / "all" / "digits-squared.png",
        results / "few" / "digits-cross_entropy.png",
    ):
        assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", ["all", "few"])
def test_what_is_measured(results, folder):
    runs = report(results / folder)["measured"]
    starts = [run["curve"][0] for run in runs]
    assert all(start == starts[0] for start in starts)
    for run in runs:
        first, last = run["curve"][0], run["curve"][-1]
        assert first["iteration"] == first["seconds"] == 0
        assert last["iteration"] == 2 and last["seconds"] > 0
        assert all(math.isfinite(last[k]) for k in ("objective", "loss"))
        assert 0 < last["loss"] < last["objective"] and 0 <= last["accuracy"] <= 1
        rates = lecture.RATES.get(run["method"].split()[0], ())
        assert [trial["rate"] for trial in run["trials"]] == list(rates)
        if rates:
            best = min(run["trials"], key=lambda trial: trial["objective"])
            assert run["method"].endswith(f" {best['rate']:g}")


def test_the_next_rate_runs_where_the_best_is_lost(monkeypatch):
    """Trials rank 3, 1, 2; in the long run 3 ends where it began and 1 is not finite."""
    ends = {1.0: (0.2, None), 2.0: (0.3, 0.1), 3.0: (0.1, 0.9)}

    def train(method, part, given, rate, seconds, evaluations):
        end = ends[rate][0 if seconds == given.trial_seconds else 1]
        return {"curve": [{"objective": 0.9}, {"objective": end}], "inside": {}}

    monkeypatch.setattr(cnn, "_train", train)
    method = lecture.Method("adam", 1, lambda p: p, lambda *a: a, rates=(1.0, 2.0, 3.0))
    given = SimpleNamespace(trial_seconds=1.0, seconds=10.0, evaluations=1)
    part = SimpleNamespace(data="digits", loss="squared")
    run = cnn._run(method, part, given)
    assert run["method"] == "adam 2" and run["lost"] == [3.0, 1.0]
    assert run["curve"][-1]["objective"] == 0.1


@pytest.mark.parametrize("folder", ["all", "few"])
def test_newton_goes_down_as_its_line_search_promises(results, folder):
    run = report(results / folder)["measured"][0]
    assert run["method"] == "newton 20%"
    assert run["curve"][-1]["objective"] < run["curve"][0]["objective"]
    assert all(0 < step <= 1 for step in run["inside"]["step"])
    assert all(1 <= count <= 250 for count in run["inside"]["cg"])
    # λ starts at 1 in the lecture's units, and moves by 3/2 or 2/3 at most once an iteration.
    assert 2 / 3 - 1e-6 <= run["inside"]["damping"][0] <= 3 / 2 + 1e-6


@pytest.mark.parametrize("loss", lecture.LOSSES)
def test_objective_is_the_lectures(loss):
    network, c = lecture.Network((2, 2, 2)), 0.5
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    labels = np.arange(6)
    params = network.init(jax.random.key(1), images)
    task = lecture.problem(loss, network, c)
    outputs = network.apply(params, images)
    one_hot = jnp.eye(10)[labels]
    each = -jnp.sum(one_hot * jax.nn.log_softmax(outputs), axis=1)
    if loss == "squared":
        each = jnp.sum((outputs - one_hot) ** 2, axis=1)
    square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    found = task.scale * task.objective(params, (images, task.targets(labels)))
    np.testing.assert_allclose(found, square / (2 * c) + jnp.mean(each), rtol=1e-6)


@pytest.mark.parametrize("side", [7, 8])
def test_pooling_is_max_pooling(side):
    x = nn.relu(jax.random.normal(jax.random.key(0), (3, side, side, 2)))
    expected = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
    np.testing.assert_array_equal(lecture.pooled(x), expected)


def test_subsampled_matrix_is_of_so_many_examples():
    network = lecture.Network((2, 2, 2))
    images = jax.random.normal(jax.random.key(0), (40, 8, 8, 1))
    batch = images, jnp.arange(40) % 10
    params = network.init(jax.random.key(1), images)
    task = lecture.problem("cross_entropy", network, 1.0)
    (method,) = lecture.methods(["newton"], task, params, batch, [10.0], (1, 1))
    assert method.name == "newton 10%" and method.batch_size == 40
    curvature_fn = kfgn.value_grad_and_curvature(task.objective, "empirical", model_examples=4)

    def pushed(p):
        _, curvature = curvature_fn(p, batch)
        return curvature.linearized(curvature.gradient)

    assert jax.eval_shape(pushed, params).shape == (4, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "above zero"),
        (["--images", "1501"], "1500 training images"),
        (["--losses", "hinge"], "--losses: no loss 'hinge'"),
        (["--methods", ""], "--methods: takes some of newton"),
        (["--data", ""], "--data: takes some of curves"),
        (["--data", "digitz"], "did you mean 'digits'"),
        (["--data", "curves"], "no labels"),
        (["--channels", "2,2"], "three numbers"),
        (["--percent", "101"], "up to 100"),
        (["--percent", "many"], "above zero|zero or above"),
        (["--seed", "-1"], "--seed"),
        (["--second", "1"], "unrecognized arguments"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path, monkeypatch):
    empty = cnn.load("digits")._replace(train_labels=None)
    if "curves" in arguments:  # without generating them
        monkeypatch.setattr(cnn, "load", lambda *_, **__: empty)
    with pytest.raises(BenchmarkError, match=message):
        cnn.main([*SMALL, "--out", str(tmp_path), *arguments])


def test_unreadable_data_is_one_line(tmp_path, capsys):
    arguments = ["cnn", "--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path)]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "no such file" in line


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [*SMALL, "--losses", "squared", "--methods", "adam", "--iterations", "1"]
    with pytest.raises(BenchmarkError, match="cannot write results"):
        cnn.main([*arguments, "--out", str(tmp_path / "file" / "inside")])
