"""Killed at any moment of saving, a run loses at most an interval, and ends with the undisturbed run's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import write_corpus
from faults.test_soak import RUN
from logged import numbers

from megahp import checkpoint

INTERVAL = 2


def test_killed_ten_times_while_saving(tmp_path: Path) -> None:
    killed_while_saving(tmp_path, 10)


@pytest.mark.slow
def test_killed_two_hundred_times_while_saving(tmp_path: Path) -> None:
    killed_while_saving(tmp_path, 200)


def killed_while_saving(folder: Path, kills: int) -> None:
    write_corpus(folder / "corpus", 0.02)
    steps = 8 * kills
    alone = RUN.replace("dp_replicate = 2", "").replace("tokens = 9600", f"tokens = {64 * steps}")
    (folder / "run.toml").write_text(alone.replace("keep = 3", f"keep = {steps}"))
    words = [sys.executable, "-m", "megahp", "train", "run.toml", "log.name=undisturbed"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=600)
    driver = Path(__file__).parent / "kills.py"
    done = subprocess.run(
        [sys.executable, driver, str(folder), str(kills), "1"], capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr
    *lives, end = map(json.loads, done.stdout.splitlines())
    assert end == {"code": 0} and len(lives) == kills
    newest = [max((int(name.removeprefix("step-")) for name in life["kept"]), default=0) for life in lives]
    lost = [life["begun"] - step for life, step in zip(lives, newest, strict=True)]
    assert max(lost) <= INTERVAL, lives  # what was begun is there, or what was there before is the newest
    assert max(lost) > 0 >= min(lost), lives  # saves were met both unfinished and finished
    assert numbers(folder / "runs/killed") == numbers(folder / "runs/undisturbed")
    mine, others = (checkpoint.complete(folder / "runs" / name / "checkpoints") for name in ("killed", "undisturbed"))
    assert [path.name for path in mine] == [path.name for path in others] and len(mine) == steps // INTERVAL
    for path, other in zip(mine, others, strict=True):
        assert checkpoint.problems(path) == []
        assert shards(path) == shards(other)


def shards(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]
