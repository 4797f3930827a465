"""A training killed twice ends as if it had not been."""

from __future__ import annotations

import json

from benchmarks.__main__ import main


def test_a_kill_costs_no_more_than_since_the_last_checkpoint(tmp_path):
    arguments = ["kills", "--kills", "2", "--longest", "0.3", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["measured"]
    assert found["same_as_without"] and len(found["kills"]) == 2
    assert all(0 <= kill["lost"] <= 5 for kill in found["kills"])
    assert found["updates"] > 5
