"""Test how child runs' ends are recognized."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megahp.config import Config, config_to_dict, config_to_toml, resolve, with_values
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


def test_what_a_run_decided_at_its_start_is_not_another_config(tmp_path: Path) -> None:
    """A sweep that is repeated finds its runs, whose config.toml holds what was "auto"."""
    asked = {"train.dtype": "auto", "compute.compile": "auto", "batch.micro_batch": "auto", "log.root": str(tmp_path)}
    decided = {"train.dtype": "bfloat16", "compute.compile": False, "batch.largest_micro_batch": 8}
    config = resolve.from_dict(config_to_dict(with_values(Config(), asked)), "a run file")
    config.directory.mkdir()
    (config.directory / "config.toml").write_text(config_to_toml(with_values(config, decided)))
    child_runs.check_same_config(config)
    with pytest.raises(UserError, match="was trained with train.dtype = 'bfloat16', not 'float32'"):
        child_runs.check_same_config(with_values(config, {"train.dtype": "float32"}))


def test_the_loss_of_a_run_that_has_ended(tmp_path: Path) -> None:
    """The mean over the further sets, or the mixture's; nothing is trained again."""
    config = with_values(Config(), {"log.root": str(tmp_path)})
    config.directory.mkdir()
    event = {"step": 2, "tokens": 2, "time": 0, "event": "finished", "reason": ""}
    (config.directory / "events.jsonl").write_text(json.dumps(event) + "\n")
    lines = [
        {"step": 1, "tokens": 1, "validation_loss": 9.0},
        {"step": 2, "tokens": 2, "validation_loss": 3.0, "validation_losses": {"source": 8.0, "a": 1.0, "b": 4.0}},
    ]
    (config.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert child_runs.loss_of(config, 1) == 3.0
    assert child_runs.loss_of(with_values(config, {"data.validation": ("a:x", "b:y")}), 1) == 2.5
    nothing = {"step": 3, "tokens": 3, "validation_loss": None}  # not a number
    (config.directory / "metrics.jsonl").write_text(json.dumps(nothing) + "\n")
    assert child_runs.loss_of(config, 1) == math.inf
    (config.directory / "events.jsonl").write_text(json.dumps({**event, "event": "broken"}) + "\n")
    assert child_runs.loss_of(config, 1) == math.inf
