"""Runs that are told to leave."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from faults.test_faults import ALONE, events, start, train
from logged import numbers

from megahp import checkpoint


def test_a_signal_between_two_starts_ends_it(folder: Path) -> None:
    kill = ({"kind": "kill", "rank": 0, "step": 3},)
    started = start(folder, "between", *ALONE, "--ranks", "1", "--restarts", "2", faults=kill)
    while not (folder / "between.json.0").exists():
        assert started.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # the next start is importing
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=60)
    assert started.returncode in (143, -signal.SIGTERM), said
    assert not events(folder, "between", "resumed", "finished")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_saves_and_stops(folder: Path, number: signal.Signals) -> None:
    name = number.name
    words = ("--ranks", "2", "checkpoint.every=0", "--resume", "auto")
    pause = ({"kind": "slow", "rank": 0, "step": 1},)  # or it might be over before it is told
    started = start(folder, name, *words, faults=pause)
    log = folder / "runs" / name / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert started.poll() is None
        time.sleep(0.02)
    told = time.monotonic()
    started.send_signal(number)
    said, _ = started.communicate(timeout=60)
    assert started.returncode == 75 and time.monotonic() - told < 20, said
    (stopped,) = events(folder, name, "stopped")
    (saved,) = checkpoint.complete(folder / "runs" / name / "checkpoints")
    assert saved.name == f"step-{stopped['step']:08d}" and name in stopped["reason"]
    code, said = train(folder, name, *words)
    assert code == 0, said
    assert [event["event"] for event in events(folder, name, "started", "resumed", "finished")] == [
        "started",
        "resumed",
        "finished",
    ]
    assert len(numbers(folder / "runs" / name)) == 40


def test_a_time_limit_of_its_own(folder: Path) -> None:
    slow = ({"kind": "slow", "rank": 0, "step": 1},)
    words = (*ALONE, "--ranks", "1", "--restarts", "0", "resilience.stop_after=0.02")
    code, said = train(folder, "limited", *words, faults=slow)
    assert code == 75, said
    (stopped,) = events(folder, "limited", "stopped")
    assert "resilience.stop_after" in stopped["reason"] and 0 < stopped["step"] < 40
