"""The autoencoder's command line, run for real on small networks and scikit-learn's digits."""

import csv
import errno
import json
import os
import shutil
import signal
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import datasets
from benchmarks.__main__ import main
from benchmarks.experiments import autoencoder
from benchmarks.experiments.autoencoder import report
from benchmarks.experiments.autoencoder.training import COLUMNS
from benchmarks.harness import race
from benchmarks.harness.checkpoints import Checkpoint
from benchmarks.harness.runs import Metrics

# optax's Adam raises a float to an integer power, which strict promotion forbids.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    # What is left of reading a damaged checkpoint may end after orbax has closed its event loop.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.loose_dtypes,
]


FEW_LAYERS = ["--layers", "4"]  # for the tests of kfgn's optimizers: their layers are slow to trace
SMALL = ["--data", "digits", "--layers", "12,4", "--batch-size", "100", "--no-sgd-yardstick"]


@pytest.fixture
def figures():
    """Asked for by the tests that look at the plots."""


@pytest.fixture(autouse=True)
def no_figures_unless_asked_for(request, monkeypatch):
    """Spares the other tests the drawing, which takes longer than their training."""
    if "figures" not in request.fixturenames:
        for plot in ("plot_losses", "plot_reconstructions"):
            monkeypatch.setattr(report, plot, lambda *_: None)


def run(out: Path, *arguments: str, small: bool = True) -> int:
    """Runs the experiment as the command line does; returns its exit code."""
    return main(["autoencoder", *(SMALL if small else []), "--out", str(out), *arguments])


def metrics(out: Path, optimizer: str, number: int = 1) -> list[dict[str, str]]:
    """The rows of the CSV file of one run."""
    (path,) = out.glob(f"*-{number:03}/{optimizer}/metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    """A column's numbers, empty cells left out."""
    return [float(row[name]) for row in rows if row[name]]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error has left on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def watch_batches(monkeypatch: pytest.MonkeyPatch, see) -> None:
    """Calls ``see`` with the number and the inputs of every batch, when it is asked for."""
    batches = race.batches

    def watched(*given):
        for update, batch in enumerate(batches(*given), start=given[-1]):
            see(update, batch[0])
            yield batch

    monkeypatch.setattr(race, "batches", watched)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, update: int, interrupt) -> None:
    """Calls ``interrupt`` once, when the batch of this update is asked for."""
    pending = [interrupt]
    watch_batches(monkeypatch, lambda at, _: at == update and pending and pending.pop()())


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["adam", "kfra"])
def test_a_run_leaves_metrics_settings_table_and_plots(tmp_path, capsys, figures, optimizer):
    arguments = ["--optimizer", optimizer, "--updates", "6", "--eval-every", "2"]
    small = [word for word in SMALL if word != "--no-sgd-yardstick"]
    assert run(tmp_path, *small, *arguments, small=False) == 0

    folder = tmp_path / f"digits-{optimizer}-001"
    rows = metrics(tmp_path, optimizer)
    assert tuple(rows[0]) == COLUMNS
    assert column(rows, "update") == [0, 2, 4, 6]
    assert column(rows, "seconds") == sorted(column(rows, "seconds"))
    assert len(column(rows, "train_loss")) == 4
    assert rows[-1]["test_loss"] and not rows[1]["test_loss"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    adapted = ["step_damping", "factor_damping", "step_size"]
    assert all(bool(rows[-1][name]) == (optimizer == "kfra") for name in adapted)

    record = json.loads((folder / optimizer / "settings.json").read_text())
    assert record["settings"]["batch_size"] == 100
    (session,) = record["sessions"]
    assert session["outcome"] == "finished"
    assert session["compile_seconds"] > 0
    assert {"jax", "optax", "kfgn", "device", "cores", "date"} <= session.keys()

    shown = capsys.readouterr().out
    assert optimizer in (folder / "table.txt").read_text()
    assert "SGD steps" in shown and f"{optimizer}  6/6" in shown
    for plot in ("losses.png", "reconstructions.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("optimizer", ["momentum", "kfra", "kfac"])
def test_an_interrupted_run_keeps_its_rows_and_resumes_to_the_same_numbers(
    tmp_path, monkeypatch, optimizer
):
    arguments = ["--optimizer", optimizer, "--updates", "8", "--eval-every", "2", *FEW_LAYERS]
    assert run(tmp_path / "whole", *arguments) == 0

    interrupt_at(monkeypatch, 5, press_ctrl_c)
    assert run(tmp_path / "parts", *arguments) == 130
    assert column(metrics(tmp_path / "parts", optimizer), "update") == [0, 2, 4, 6]
    (folder,) = (tmp_path / "parts").iterdir()
    assert "interrupted" in (folder / "table.txt").read_text()

    assert run(tmp_path / "parts", *arguments, "--resume") == 0
    whole, parts = (metrics(tmp_path / name, optimizer) for name in ("whole", "parts"))
    assert column(parts, "update") == [0, 2, 4, 6, 8]
    for name in set(COLUMNS) - {"seconds", "test_loss"}:
        np.testing.assert_array_equal(column(whole, name), column(parts, name), err_msg=name)
    assert whole[-1]["test_loss"] == parts[-1]["test_loss"]
    record = json.loads((folder / optimizer / "settings.json").read_text())
    assert [session["from_update"] for session in record["sessions"]] == [0, 6]


@pytest.mark.parametrize("update", [0, 3])
def test_ctrl_c_that_no_handler_catches_keeps_the_rows_too(tmp_path, monkeypatch, figures, update):
    interrupt_at(monkeypatch, update, raise_keyboard_interrupt)
    arguments = ["--optimizer", "adam", "--updates", "4", "--eval-every", "1"]
    assert run(tmp_path, *arguments) == 130
    assert column(metrics(tmp_path, "adam"), "update") == list(range(update + 1))
    (folder,) = tmp_path.iterdir()
    assert (folder / "losses.png").exists() and (folder / "reconstructions.png").exists()
    assert run(tmp_path, *arguments, "--resume") == 0
    assert column(metrics(tmp_path, "adam"), "update") == [0, 1, 2, 3, 4]


def test_ctrl_c_while_compiling_waits_for_the_compiler(tmp_path, monkeypatch):
    compile_step = autoencoder.compile_step

    def interrupted(*arguments):
        press_ctrl_c()
        return compile_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "compile_step", interrupted)
        assert run(tmp_path, "--compare", "adam,sgd", "--updates", "2") == 130
    assert column(metrics(tmp_path, "adam"), "update") == [0]
    assert run(tmp_path, "--compare", "adam,sgd", "--updates", "2", "--resume") == 0
    assert column(metrics(tmp_path, "adam"), "update") == [0, 1, 2]


def test_an_interrupted_comparison_resumes_with_those_not_yet_run(tmp_path, monkeypatch, capsys):
    arguments = ["--compare", "adam,sgd", "--updates", "4", "--eval-every", "2"]
    interrupt_at(monkeypatch, 2, press_ctrl_c)
    assert run(tmp_path, *arguments) == 130
    (folder,) = tmp_path.iterdir()
    assert not (folder / "sgd").exists()
    assert run(tmp_path, *arguments, "--resume") == 0
    assert column(metrics(tmp_path, "adam"), "update")[-1] == 4
    assert column(metrics(tmp_path, "sgd"), "update")[-1] == 4
    # Nothing is left to train, and more updates may be asked for.
    assert run(tmp_path, *arguments, "--resume") == 0
    assert run(tmp_path, *arguments, "--updates", "6", "--resume") == 0
    assert column(metrics(tmp_path, "sgd"), "update") == [0, 2, 4, 6]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("names", ["adam,sgd", "kfra,adam"])
def test_compared_optimizers_see_the_same_start_and_the_same_batches(
    tmp_path, monkeypatch, capsys, names
):
    seen: dict[int, list[np.ndarray]] = {}
    watch_batches(monkeypatch, lambda at, inputs: seen.setdefault(at, []).append(inputs))
    assert run(tmp_path, "--compare", names, "--updates", "3", "--eval-every", "1") == 0
    assert sorted(seen) == [0, 1, 2]
    for first, second in seen.values():
        np.testing.assert_array_equal(first, second)
    one, other = (metrics(tmp_path, name) for name in names.split(","))
    assert one[0]["train_loss"] == other[0]["train_loss"]
    assert one[1]["batch_loss"] == other[1]["batch_loss"]
    assert one[3]["train_loss"] != other[3]["train_loss"]
    assert all(name in capsys.readouterr().out for name in names.split(",")[:1])


def test_a_diverging_run_stops_and_says_so(tmp_path, capsys):
    arguments = ["--optimizer", "sgd", "--learning-rate", "1e30", "--eval-every", "1"]
    assert run(tmp_path, *arguments, "--updates", "50") == 0
    assert "sgd (diverged)" in capsys.readouterr().out
    assert len(metrics(tmp_path, "sgd")) < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "kfr"], "no optimizer 'kfr'; did you mean 'kfra'"),
        (["--compare", "adam,nestrov"], "did you mean 'nesterov'"),
        (["--compare", "adam,adam"], "names adam twice"),
        (["--compare", ","], "--compare"),
        (["--compare", "adam", "--optimizer", "sgd"], "not allowed with"),
        (["--optimizer", "adam", "--data", "curvs"], "no data set 'curvs'; did you mean 'curves'"),
        (["--optimizer", "adam", "--batch-size", "1501"], "fewer than a batch: 1501"),
        (["--optimizer", "adam", "--batch-size", "0"], "--batch-size: must be a whole number"),
        (["--optimizer", "adam", "--updates", "-3"], "--updates: must be a whole number"),
        (["--optimizer", "adam", "--updates", "1e3"], "--updates: must be a whole number"),
        (["--optimizer", "adam", "--eval-every", "0"], "--eval-every"),
        (["--optimizer", "adam", "--learning-rate", "-1"], "--learning-rate: must be a number"),
        (["--optimizer", "adam", "--learning-rate", "nan"], "--learning-rate: must be a number"),
        (["--optimizer", "adam", "--learning-rate", "0"], "must be a number above zero"),
        (["--optimizer", "adam", "--l2", "-1"], "--l2: must be a number, zero or above"),
        (["--optimizer", "adam", "--decay-period", "0"], "--decay-period"),
        (["--optimizer", "adam", "--layers", "12,x"], "--layers"),
        (["--optimizer", "adam", "--seed", "-1"], "--seed"),
        (["--optimizer", "adam", "--option", "gamma=3"], "--option is for kfra, kflr and kfac"),
        (["--optimizer", "kfra", "--option", "gamma"], "must look like name=value"),
        (["--optimizer", "kfra", "--learning-rate", "1"], "are for the first-order optimizers"),
        (["--optimizer", "adam", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--optimizer", "adam", "--resume"], "no run named digits-adam-*"),
    ],
)
def test_a_bad_command_line_is_one_clear_line(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("facter_damping=1", "unexpected keyword argument 'facter_damping'"),
        ("factor_damping=-1", "factor_damping"),
        ("factor_damping=high", "kfra: "),
        ("refresh_inverse_every=0", "refresh_inverse_every"),
        ("decay=abc", "kfra: "),
    ],
)
def test_a_bad_option_of_kfgn_is_one_clear_line(tmp_path, capsys, option, message):
    assert run(tmp_path, "--optimizer", "kfra", "--option", option, *FEW_LAYERS) == 2
    assert message in error_line(capsys)


def test_without_an_optimizer_kfra_and_adam_train_a_short_while():
    given = autoencoder._parse([])
    task = autoencoder.tasks.autoencoder("digits", None, (4,), 100, 0.0)
    short = [autoencoder._prepare(name, given, task, 0).schedule for name in given.optimizers]
    assert given.optimizers == ("kfra", "adam")
    assert [s.updates for s in short] == list(autoencoder.SHORT_UPDATES.values())
    named = autoencoder._parse(["--optimizer", "kfra"])
    assert autoencoder._prepare("kfra", named, task, 0).schedule.updates == 800


def test_options_reach_kfgn(tmp_path):
    damped = ["--optimizer", "kfra", "--updates", "1", "--option", "factor_damping=123.0"]
    assert run(tmp_path, *damped) == 0
    assert column(metrics(tmp_path, "kfra"), "factor_damping")[0] == 123.0


def test_an_average_of_the_parameters_is_what_is_evaluated(tmp_path):
    arguments = ["--optimizer", "kfra", "--updates", "3", "--eval-every", "1", *FEW_LAYERS]
    assert run(tmp_path, *arguments) == 0
    assert run(tmp_path, *arguments, "--option", "average_decay=0.9") == 0
    plain, averaged = (metrics(tmp_path, "kfra", number) for number in (1, 2))
    assert column(plain, "batch_loss") == column(averaged, "batch_loss")
    assert column(plain, "train_loss")[:2] == column(averaged, "train_loss")[:2]
    assert column(plain, "train_loss")[3] != column(averaged, "train_loss")[3]


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        (["--seed", "1"], "seed is 1 now and was 0"),
        (["--batch-size", "50"], "batch_size is 50 now and was 100"),
        (["--learning-rate", "0.5"], "learning_rate is 0.5 now and was 0.001"),
        (["--layers", "12,3"], "layers is [12, 3] now and was [12, 4]"),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(tmp_path, capsys, changed, setting):
    arguments = ["--optimizer", "adam", "--updates", "1"]
    assert run(tmp_path, *arguments) == 0
    capsys.readouterr()
    assert run(tmp_path, *arguments, *changed, "--resume") == 2
    assert setting in error_line(capsys)


@pytest.mark.parametrize("file", ["arrays/manifest.ocdbt", "arrays/_METADATA", "numbers/metadata"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, capsys, file):
    arguments = ["--optimizer", "adam", "--eval-every", "1", "--checkpoint-every", "1"]
    assert run(tmp_path, *arguments, "--updates", "2") == 0

    def damage(update):
        (damaged,) = tmp_path.glob(f"*/adam/checkpoints/{update}/{file}")
        damaged.write_bytes(damaged.read_bytes()[:-10])

    damage(2)
    capsys.readouterr()
    assert run(tmp_path, *arguments, "--updates", "3", "--resume") == 2  # done, but not all well
    said = capsys.readouterr()
    assert "cannot read the checkpoint" in said.err and "continues from update 1" in said.out
    assert column(metrics(tmp_path, "adam"), "update") == [0, 1, 2, 3]
    damage(2)
    damage(3)
    assert run(tmp_path, *arguments, "--updates", "4", "--resume") == 2
    assert "cannot read the checkpoint in" in capsys.readouterr().err.splitlines()[-1]


def test_missing_data_are_one_clear_line(tmp_path, monkeypatch, capsys):
    def load(name: str, **_: object) -> None:
        raise datasets.DataError(f"{name}: no such file")

    monkeypatch.setattr(datasets, "load", load)
    assert run(tmp_path, "--optimizer", "adam") == 2
    assert "digits: no such file" in error_line(capsys)


def test_a_run_folder_that_cannot_be_written_is_found_before_training(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert run(file, "--optimizer", "adam") == 2
    assert f"cannot write to the run folder {file}" in error_line(capsys)


def test_a_disk_without_room_is_found_before_training(tmp_path, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert run(tmp_path, "--optimizer", "adam") == 2
    assert "MiB free" in error_line(capsys)


@pytest.mark.parametrize("fallback", ["a temporary folder", "nothing but the terminal"])
def test_a_disk_that_fills_up_costs_no_rows(tmp_path, monkeypatch, capsys, fallback):
    def full(self: Metrics, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(Metrics, "_append_last", full)
    if fallback != "a temporary folder":
        temporary.rmdir()
    arguments = ["--optimizer", "adam", "--updates", "4", "--eval-every", "1"]
    assert run(tmp_path / "out", *arguments) == 2

    captured = capsys.readouterr()
    assert "No space left on device" in captured.err.splitlines()[-1]
    if fallback == "a temporary folder":
        last = sorted(temporary.glob("kfgn-run-*"), key=lambda folder: folder.stat().st_mtime)[-1]
        assert str(last) in captured.err
        with (last / "adam" / "metrics.csv").open(newline="") as file:
            assert column(list(csv.DictReader(file)), "update") == [0, 1, 2, 3, 4]
    else:
        assert "0,0.0," in captured.out and "\n4," in captured.out


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("No space left")]
)
def test_a_failing_checkpoint_does_not_end_the_run(tmp_path, monkeypatch, capsys, error):
    def full(*_: object, **__: object) -> None:
        raise error  # a ValueError where tensorstore writes

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    assert run(tmp_path, "--optimizer", "adam", "--updates", "2") == 2
    assert f"adam/checkpoints: {error}" in capsys.readouterr().err
    assert len(metrics(tmp_path, "adam")) == 3


def test_checkpoints_come_as_often_as_asked_and_two_are_kept(tmp_path, monkeypatch):
    saved = []
    save = Checkpoint.save

    def recording(self: Checkpoint, update: int, *rest) -> None:
        saved.append(update)
        save(self, update, *rest)

    monkeypatch.setattr(Checkpoint, "save", recording)
    arguments = ["--optimizer", "adam", "--updates", "7", "--eval-every", "4"]
    assert run(tmp_path, *arguments, "--checkpoint-every", "3") == 0
    assert saved == [3, 6, 7]
    assert {kept.name for kept in tmp_path.glob("*/adam/checkpoints/*")} == {"6", "7"}
    assert column(metrics(tmp_path, "adam"), "update") == [0, 4, 7]


def test_reference_curves_are_read_and_drawn(tmp_path, figures):
    (tmp_path / "digits_hessian_free.csv").write_text(
        "update,train_loss,sgd_step_equivalents\n0,40,0\n10,20,50\n"
    )
    (tmp_path / "digits_tuned_adam.csv").write_text("update,train_loss\n0,40\n100,25\n")
    (tmp_path / "digits_broken.csv").write_text("update,loss\n0,40\n")
    (tmp_path / "mnist_other.csv").write_text("update,train_loss\n0,400\n")
    curves, problems = report.references("digits", tmp_path)
    assert [curve.label for curve in curves] == ["hessian free", "tuned adam"]
    assert curves[0].columns["sgd_steps"] == [0.0, 50.0] and "sgd_steps" not in curves[1].columns
    assert len(problems) == 1 and "digits_broken.csv" in problems[0]
    report.plot_losses(tmp_path / "losses.png", [], "title", curves, sgd_seconds=0.1)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_another_folder_are_drawn_beside(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(report, "plot_losses", lambda *given: drawn.append(given[3]))
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "digits_peer.csv").write_text("update,loss_first_10k\n0,40\n10,20\n")
    arguments = ["--optimizer", "adam", "--updates", "2", "--references", str(folder)]
    assert run(tmp_path, *arguments) == 0
    (peer,) = (curve for curve in drawn[0] if curve.label == "peer")
    assert peer.columns["train_loss"] == [40.0, 20.0]
    missing = str(tmp_path / "nowhere")
    assert run(tmp_path, "--optimizer", "adam", "--references", missing) == 2
    assert "--references must be a folder" in capsys.readouterr().err
