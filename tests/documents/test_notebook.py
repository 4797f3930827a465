"""The notebook runs from top to bottom."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


# zmq and asyncio warn about sockets and loops that Jupyter's client leaves to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.loose_dtypes
def test_quickstart_runs_and_kfra_learns():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # a tenth of the updates
        cell.source = cell.source.replace("adam_step, 400", "adam_step, 40")
        cell.source = cell.source.replace("kfra_step, 200", "kfra_step, 20")
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": "."}})
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    losses = {
        line.split(":")[0]: float(line.split()[1])
        for line in printed.splitlines()
        if line.startswith(("Adam:", "KFRA:"))
    }
    # Adam makes twice the updates; KFRA must be ahead all the same.
    assert losses["KFRA"] < losses["Adam"], printed
