"""An experiment's command line run whole, and what it leaves."""

import json

from benchmarks.__main__ import main


def measured(folder, *arguments):
    """What a command writes down, which must come with a table and a plot."""
    assert main([*arguments, "--out", str(folder)]) == 0
    assert (folder / "table.txt").read_text().strip()
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    assert list(folder.glob("*.png"))
    report = json.loads((folder / "results.json").read_text())
    assert report["command"].startswith(f"python -m benchmarks {arguments[0]} --")
    return report["measured"]
