"""Test how child runs' ends are recognized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megahp.config import Config, with_values
from megahp.diagnose import child_runs
from megahp.errors import UserError


def test_skipped_steps_that_are_not_in_a_row_are_not_the_end(tmp_path: Path) -> None:
    for gap, expected in ((1, True), (2, False)):
        rest = {"tokens": 0, "time": 0, "event": "skipped", "reason": "not finite"}
        events = [{"step": gap * n, **rest} for n in range(25)]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        assert child_runs.is_done(tmp_path) == expected


def test_a_run_file_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run.toml").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="run.toml is a symbolic link"):
        child_runs.write_run_file(with_values(Config(), {"log.root": str(tmp_path)}))
    assert (tmp_path / "precious").read_text() == "precious"
