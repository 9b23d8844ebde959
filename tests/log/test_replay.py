"""Batch decisions made again from a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.test_run import copy_of, metrics

from megahp.log.replay import replay


def test_a_replay_notices_a_changed_log(folder: Path, whole: list[dict[str, Any]]) -> None:
    name = copy_of(folder, "whole", "forged")
    log = folder / "runs" / name / "metrics.jsonl"
    records = metrics(folder, name)
    for record in records[1:8]:
        record["noise_scale"] = 0.01
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert replay(folder / "runs" / name).differences != []
