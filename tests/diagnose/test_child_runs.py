"""Test how child runs' ends are recognized."""

from __future__ import annotations

import json
from pathlib import Path

from megahp.diagnose import child_runs


def test_skipped_steps_that_are_not_in_a_row_are_not_the_end(tmp_path: Path) -> None:
    for gap, expected in ((1, True), (2, False)):
        rest = {"tokens": 0, "time": 0, "event": "skipped", "reason": "not finite"}
        events = [{"step": gap * n, **rest} for n in range(25)]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        assert child_runs.is_done(tmp_path) == expected
