"""The suite: two tasks are trained for moments, and what the table says of losses is checked."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.experiments import suite
from benchmarks.experiments.suite import report, tasks
from benchmarks.experiments.trainings import sequences

pytestmark = pytest.mark.loose_dtypes


def test_command(tmp_path):
    arguments = ["suite", "--only", "tabular", "--scale", "0.002", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["measured"]["tabular"]
    assert set(found) == {"adam", "adamw", "muon", "kfra", "kfac", "kflr"}
    starts = {own["points"][0][2] for own in found.values()}
    assert len(starts) == 1
    for own in found.values():
        assert own["points"][-1][1] >= 0.12 and own["points"][-1][2] < min(starts)
        assert len(own["points"]) <= 21 and own["compile_seconds"] > 0
        assert np.isfinite(own["test_loss"])
    assert "tabular" in (tmp_path / "table.txt").read_text()
    assert (tmp_path / "profile.png").exists() and (tmp_path / "losses.png").exists()


@pytest.mark.parametrize("name", ["poisson", "heat"])
def test_equations_hold_at_their_solutions(name, monkeypatch):
    """The residuals, with the network replaced by the function that it is to find."""

    def heat(params, x):
        return [(jnp.sin(np.pi * x[0]) * jnp.exp(-0.1 * np.pi**2 * x[1]))[None]]

    monkeypatch.setattr(tasks, "hidden_values", heat)
    monkeypatch.setattr(tasks.equation, "network", lambda _, x: tasks.equation.solution(x))
    task, test, *_ = tasks.TASKS[name](0, None)
    assert float(task.evaluate(task.params)) < 1e-9  # float32: residuals of 1e-5, squared
    assert 0 < float(test(task.params)) < 1e-9  # at other points


def test_ratios():
    def trained(*losses):
        return report.Trained("", 0.0, [(k, float(k), x) for k, x in enumerate(losses)], None)

    assert report.ratio(trained(4, 1), trained(4, 2)) == 0.5
    assert report.ratio(trained(2, -2), trained(2, -1)) == 0.75  # gains of 4 and 3
    assert trained(4, 3, 1, 1).seconds_to(2) == 2 and trained(4, 3).seconds_to(2) == np.inf
    assert trained(1, np.nan).end == np.inf


def test_sources_are_told_apart(tmp_path):
    (tmp_path / "a.py").write_text("rate = 1")
    before = suite.sources(tmp_path)
    assert suite.sources(tmp_path) == before
    (tmp_path / "a.py").write_text("rate = 2")
    assert suite.sources(tmp_path) != before != suite.sources()


def test_resuming_measures_anew_what_other_sources_made(tmp_path, monkeypatch):
    trained = []

    def train(self, setting, seconds):
        trained.append(setting)
        if len(trained) == 30:  # of 24 settings and 6 whole trainings: the last
            raise KeyboardInterrupt
        return report.Trained(setting.method, 0.0, [(0, 0.0, 2.0), (1, 1.0, 1.0)], 1.0)

    monkeypatch.setattr(suite._Trainer, "train", train)
    arguments = ["suite", "--only", "tabular", "--out", str(tmp_path)]
    assert main(arguments) != 0 and len(trained) == 30
    kept = (tmp_path / "measured.jsonl").read_text()
    assert main([*arguments, "--resume"]) == 0 and len(trained) == 31
    (tmp_path / "measured.jsonl").write_text(kept)
    monkeypatch.setattr(suite, "sources", lambda: "others")
    assert main([*arguments, "--resume"]) == 0 and len(trained) == 61


def test_another_inverse_reaches_kfgn_and_trains_only_its_methods_again(tmp_path, monkeypatch):
    made, trained = [], []

    def make(*own, method, inverse):
        made.append((method, inverse))
        raise KeyboardInterrupt

    def train(self, setting, seconds):
        trained.append(setting.method)
        if len(trained) == 30:  # the last
            self._compiled(setting.method, None)
        return report.Trained(setting.method, 0.0, [(0, 0.0, 2.0), (1, 1.0, 1.0)], 1.0)

    monkeypatch.setattr(suite.kfgn, "make", make)
    monkeypatch.setattr(suite._Trainer, "train", train)
    arguments = ["suite", "--only", "tabular", "--out", str(tmp_path)]
    assert main([*arguments, "--inverse", "ekfac"]) != 0 and made == [("kflr", "ekfac")]
    assert main([*arguments, "--resume"]) == 0
    assert trained[30:] == ["kfra", "kfac", "kflr"]


def test_text_of_the_test_is_of_the_same_characters():
    (count, text), held = sequences.characters(), sequences.later_characters()
    assert held.shape[1] == 33 and len(held) > 1000 and int(held.max()) < count
    assert not (
        set(map(tuple, np.asarray(held).tolist())) & set(map(tuple, np.asarray(text).tolist()))
    )
