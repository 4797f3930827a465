"""The notebooks run from top to bottom, with fewer updates, and show what they say."""

from __future__ import annotations

import re
from typing import Any

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest

from tests.documents.pages import ROOT

# What makes each short, by regular expressions.
SHORTER = {
    "quickstart": {r"adam_step, 400": "adam_step, 40", r"kfra_step, 200": "kfra_step, 20"},
    "blocks": {r"UPDATES = \d+": "UPDATES = 10"},
    "damping": {r"UPDATES = \d+": "UPDATES = 12", r'    "from (2|0).*\n': ""},
    "posterior": {
        r"UPDATES = \d+": "UPDATES = 30",
        r"subplots\(1, 4": "subplots(1, 2",
        r'"full", "blocks", ': "",
    },
    "saddles": {r"UPDATES = \d+": "UPDATES = 10"},
    "transformer": {
        r"UPDATES = .*": 'UPDATES = {"KFLR": 5, "Adam": 5}',
        r"0.003, 0.01, 0.03": "",
    },
    "physics": {r"SECONDS = [\d.]+": "SECONDS = 0.05", r'    "(L-BFGS|Adam)": .*\n': ""},
}


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the code in this process, which has jax and a cache of what was compiled."""
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    scope: dict[str, Any] = {"__name__": name}
    used = set()
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        code = cell.source
        assert cell.outputs or "plt." not in code, f"cell {number} has no picture: execute it"
        for pattern, replacement in SHORTER[name].items():
            code, count = re.subn(pattern, replacement, code)
            used |= {pattern} if count else set()
        exec(compile(code, f"{name}.ipynb, cell {number}", "exec", dont_inherit=True), scope)
    assert used == set(SHORTER[name])
    return scope


def test_every_notebook_is_here():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SHORTER)


@pytest.fixture(autouse=True)
def float32_after():
    """A notebook may take float64 for its own."""
    yield
    jax.config.update("jax_enable_x64", False)


pytestmark = pytest.mark.loose_dtypes


def test_quickstart_learns(monkeypatch):
    histories = run("quickstart", monkeypatch)["histories"]
    # Adam makes twice the updates; KFRA must be ahead all the same.
    assert histories["KFRA"][-1][2] < histories["Adam"][-1][2]


def test_blocks_are_near_at_the_start(monkeypatch):
    at = run("blocks", monkeypatch)["at"]["start"]
    size = abs(at["Gauss-Newton"]).max()
    assert abs(at["KFLR"] - at["Gauss-Newton"]).max() < 0.5 * size
    assert abs(at["Hessian"] - at["Gauss-Newton"]).max() > 0.05 * size


def test_damping_adapts(monkeypatch):
    runs = run("damping", monkeypatch)["runs"]
    ends = {name: records[-1]["step_damping"] for name, records in runs.items()}
    assert ends["from 150"] < 150 == ends["fixed at 150"]


def test_posterior_is_wide_in_the_gap(monkeypatch):
    widths = run("posterior", monkeypatch)["widths"]["kronecker"]
    assert widths[60] > 2 * min(widths)


def test_saddles_are_left(monkeypatch):
    scope = run("saddles", monkeypatch)
    ends = {name.split(",")[0]: points[-1] for name, points in scope["paths"].items()}
    assert abs(ends["Newton"]).max() < 1e-3 and abs(ends["KFLR"] - 1).max() < 0.1
    assert all(share == 0 for shares in scope["shares"]["relu"] for share in shares)
    assert scope["shares"]["tanh"][0][0] > 0.2 and scope["whole"]["relu"][0] < -0.01


def test_transformer_learns(monkeypatch):
    scope = run("transformer", monkeypatch)
    assert not scope["found"].unassigned
    assert scope["histories"]["KFLR"][-1][2] < 0.8 * scope["histories"]["KFLR"][0][2]


def test_physics_solves(monkeypatch):
    scope = run("physics", monkeypatch)
    objective, batch = scope["objective"], scope["batch"]
    assert objective(scope["runs"]["KFLR"][0], batch) < objective(scope["start"], batch)
