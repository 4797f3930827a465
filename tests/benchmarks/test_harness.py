"""What the experiments share: the command line, the ledger, batches, rates, models."""

from __future__ import annotations

import os
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfgn
from benchmarks import BenchmarkError
from benchmarks.__main__ import EXPERIMENTS, main
from benchmarks.harness import interrupt, optimizers, race
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.models import chain, chain_params


def test_a_missing_command_or_an_unknown_one_is_one_clear_line(capsys):
    for arguments, said in (([], "command"), (["autoencodr"], "autoencoder")):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line


def test_every_command_has_a_command_line_of_its_own(monkeypatch):
    received = []
    for name in EXPERIMENTS:
        module = types.ModuleType(f"benchmarks.experiments.{name}")
        module.main = received.append  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"benchmarks.experiments.{name}", module)
        assert main([name, "--repeat", "3"]) == 0
    assert received == [["--repeat", "3"]] * len(EXPERIMENTS)


def test_the_first_ctrl_c_is_a_request_and_the_second_an_interrupt():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with interrupt.heard():
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked()
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not interrupt.asked()


def test_a_ledger_knows_other_settings_apart(tmp_path):
    path, here = tmp_path / "measured.jsonl", {"jax": "1"}
    ledger = Ledger(path, resume=False, environment=here)
    points = [race.Point(0, 0.0, 1.0), race.Point(1, 0.5, float("inf"))]
    added = ledger.add({"data": "a", "rate": 0.5}, points)
    again = Ledger(path, resume=True, environment=here)
    found = again.find({"rate": 0.5, "data": "a"})
    assert found == added and race.points(found) == points
    assert again.find({"rate": 0.25, "data": "a"}) is None
    elsewhere = Ledger(path, resume=True, environment={"jax": "2"})
    assert elsewhere.find({"rate": 0.5, "data": "a"}) is None
    paper = kfgn.transforms.PRESETS["paper"]  # has rules that are no JSON
    again.add(paper, 3)
    assert again.find(dict(paper)) == 3 and again.find({**paper, "step_damping": 1.0}) is None
    anew = Ledger(path, resume=False, environment=here)
    assert anew.find({"rate": 0.5, "data": "a"}) is None


def test_a_ledger_stays_where_there_is_something_left_to_do(tmp_path, capsys):
    path = tmp_path / "measured.jsonl"
    with pytest.raises(BenchmarkError, match="--resume: nothing is unfinished in"):
        Ledger(path, resume=True, environment={})
    with pytest.raises(KeyboardInterrupt), Ledger(path, resume=False, environment={}) as ledger:
        ledger.measure({"k": 1}, lambda: [2])
        raise KeyboardInterrupt
    assert "--resume" in capsys.readouterr().err
    with Ledger(path, resume=True, environment={}) as ledger:
        assert ledger.measure({"k": 1}, lambda: pytest.fail("was measured")) == [2]
    assert not path.exists()


def test_batches_depend_on_seed_and_update_alone():
    rows = np.arange(10)

    def drawn(seed, start, count):
        batches = race.batches(rows, rows, 3, seed, start)
        return np.stack([next(batches)[0] for _ in range(count)])

    whole = drawn(4, 0, 6)
    np.testing.assert_array_equal(drawn(4, 4, 2), whole[4:])
    for epoch in (whole[:3], whole[3:]):
        assert len(set(epoch.ravel().tolist())) == 9
    assert np.any(whole[:3] != whole[3:]) and np.any(drawn(5, 0, 1) != whole[:1])


def test_the_learning_rate_is_halved_every_decay_period():
    rate = optimizers.learning_rate_schedule(0.5, decay_period=10)
    assert callable(rate)
    assert [float(rate(update)) for update in (0, 9, 10, 19, 20)] == [0.5, 0.5, 0.25, 0.25, 0.125]


def test_a_chain_is_linear_where_it_is_told_and_at_its_end():
    params = chain_params((3, 4, 2, 5), seed=1)
    x = jax.random.normal(jax.random.key(0), (6, 3))
    one, two, three = (params[f"layer {k}"]["kernel"] for k in (1, 2, 3))
    expected = jnp.tanh(x @ one) @ two @ three
    np.testing.assert_array_equal(chain(linear=(2,))(params, x), expected)
