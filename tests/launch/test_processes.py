"""Ranks as processes."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from faults.test_faults import start


def test_a_second_signal_ends_ranks_that_hang(folder: Path) -> None:
    stop = ({"kind": "stop", "rank": 1, "step": 3},)
    started = start(folder, "twice", "--ranks", "2", "resilience.hang_after=60.0", faults=stop)
    while not (folder / "twice.json.0").exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    time.sleep(5.5)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=10)
    assert started.returncode == 143, said
