"""The grid of section 5.1 in small: settings, programs for many of them, and going on."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

import kfgn
from benchmarks.__main__ import main
from benchmarks.experiments import grid as experiment
from benchmarks.experiments.grid import settings as grid
from benchmarks.experiments.grid.report import best_of_adam, claims_table, losses_table
from benchmarks.experiments.grid.settings import Setting
from benchmarks.harness import race
from tests.tables.small import OBJECTIVE, make_batch, make_params

# optax's Adam promotes dtypes.
pytestmark = pytest.mark.loose_dtypes

SMALL = ("--data", "digits", "--layers", "8,4", "--batch-size", "100", "--updates", "12",
         "--second-order-updates", "4", "--exponents", "7,9", "--periods", "1,0.25",
         "--methods", "adam,sgd", "--seeds", "1")  # fmt: skip


@pytest.fixture(autouse=True)
def one_method(monkeypatch):
    """The second goes the same ways, and takes as long to compile."""
    monkeypatch.setattr(experiment, "SECOND_ORDER", ("kfra",))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The ends of all runs, one by one."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(experiment, "SECOND_ORDER", ("kfra",))
        return ends(results(tmp_path_factory.mktemp("alone")))


def results(folder, *arguments):
    assert main(["grid", *SMALL, "--out", str(folder), *arguments]) == 0
    assert "Adam's updates" in (folder / "table.txt").read_text()
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "results.json").read_text())["measured"]["digits"]


def ends(rows):
    return {row["label"]: row["points"][-1][2] for row in rows}


def test_side_by_side_and_one_by_one_are_the_same(alone, tmp_path):
    together = ends(results(tmp_path / "together", "--together", "5"))
    assert len(alone) == 2 + 5 + 2  # second order; Adam's grid and default; every second of SGD's
    assert alone.keys() == together.keys()
    for label, loss in alone.items():
        # Twelve steps in float32, whose sums go in another order.
        np.testing.assert_allclose(together[label], loss, rtol=1e-4, err_msg=label)
    assert len(set(alone.values())) == len(alone)


def test_goes_on_where_it_was_interrupted(alone, tmp_path, monkeypatch):
    run, count = race.run, [0]

    def interrupted(*arguments, **named):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return run(*arguments, **named)

    monkeypatch.setattr(race, "run", interrupted)
    again = ["grid", *SMALL, "--out", str(tmp_path / "again")]
    assert main(again) == 130
    ledger = tmp_path / "again" / "measured.jsonl"
    assert len(ledger.read_text().splitlines()) == 5
    ledger.write_text(ledger.read_text() + '{"what": "cut sh')
    assert main([*again, "--resume"]) == 0
    found = json.loads((tmp_path / "again" / "results.json").read_text())["measured"]["digits"]
    assert ends(found) == pytest.approx(alone, rel=1e-6)
    assert count[0] == 6 + (9 - 5)
    assert not ledger.exists()


@pytest.mark.parametrize("method", ["adam", "sgd", "momentum", "nesterov"])
def test_rates_halve_after_every_period(method):
    """As optax's own staircase does, setting by setting."""
    objective = kfgn.Objective(OBJECTIVE.model, OBJECTIVE.loss)
    setting = Setting(method, 2.0**-5, 0.25)
    made = grid.first_order_optimizer(setting, grid.first_order_step(method, objective), 8)
    schedule = optax.exponential_decay(2.0**-5, 2, 0.5, staircase=True)
    reference = {
        "adam": optax.adam(schedule),
        "sgd": optax.sgd(schedule),
        "momentum": optax.sgd(schedule, momentum=0.9),
        "nesterov": optax.sgd(schedule, momentum=0.9, nesterov=True),
    }[method]
    params = other = make_params()
    state, inner = made.init(params), reference.init(other)
    for k in range(8):
        batch = make_batch(seed=k)
        params, state, _ = made.step(params, state, batch, jax.random.key(0))
        updates, inner = reference.update(jax.grad(objective)(other, batch), inner, other)
        other = optax.apply_updates(other, updates)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # eight steps in float32


def points(*losses):
    return [race.Point(k, 0.1 * k, loss) for k, loss in enumerate(losses)]


def test_tables_read_the_runs():
    """The best of the grid, not the default; ratios at the loss that both reach."""
    runs = {
        Setting("kfra"): {0: points(9.0, 2.0, 1.0), 1: points(9.0, 2.0, 1.5)},
        Setting("adam", 0.25, 1.0): {0: points(9.0, 8.0, 6.0, 4.0, 2.0)},
        Setting("adam", 0.5, 1.0): {0: points(9.0, float("inf"))},
        Setting("adam", grid.ADAM_DEFAULT, 1.0): {0: points(9.0, 1.9)},
        Setting("sgd", 0.5, 0.25): {0: points(9.0, 5.0)},
    }
    assert [s.rate for s in best_of_adam(runs)] == [0.25, 0.5]
    rows = {str(c): list(c.cells) for c in losses_table("digits", runs).columns}
    labels = next(iter(rows.values()))
    assert labels == ["kfra", "adam, default", "best: adam 2^-2",
                      "best: sgd 2^-1, halved each 25%"]  # fmt: skip
    first, second = (list(row) for row in zip(
        *(c.cells for c in claims_table("digits", runs).columns), strict=True
    ))  # fmt: skip
    # Adam at its best ends at 2.0 after 4 updates, KFRA is there after 1.
    assert first[1:] == ["2.000", "1", "4", "4.0", "4.00"]
    assert second[1] == "1.900"


def test_a_run_that_is_lost_ranks_last(tmp_path, monkeypatch):
    """Its loss is written as null: JSON has no infinity."""
    run = race.run

    def lost(optimizer, *arguments):
        found, params = run(optimizer, *arguments)
        if optimizer.name == "adam 2^-7":
            found = [*found[:2], found[2]._replace(loss=float("nan"))]
        return found, params

    monkeypatch.setattr(race, "run", lost)
    rows = results(tmp_path)
    assert ends(rows)["adam 2^-7"] is None
    assert "inf" not in (tmp_path / "table.txt").read_text()  # of four, it is not the best
