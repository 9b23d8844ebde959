"""Who is blamed for a standstill, and who for a slow one."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megahp.faults.watchdog import hang_report, stack_position, stragglers


def at(step: int = 7, collective: str = "all_reduce", line: str = "engine.py:140 measure") -> dict[str, Any]:
    return {"step": step, "collective": collective, "line": line}


@pytest.mark.parametrize(
    ("said", "blamed"),
    [
        ({0: at(), 1: at(), 3: at()}, "rank 2 does not answer; rank 0, 1, 3 in all_reduce"),
        (
            {0: at(), 1: at(collective="", line="data/loader.py:9 take"), 2: at(), 3: at()},
            "rank 1 was in no collective",
        ),
        ({0: at(), 1: at(), 2: at(), 3: at(line="x.py:1 f")}, "rank 3 was in all_reduce, called at x.py:1 f"),
        ({0: at(), 1: at(), 2: at(6), 3: at()}, "rank 2 was in all_reduce, called at engine.py:140 measure, after"),
        ({0: at(), 1: at(), 2: at(), 3: at()}, "rank 0, 1, 2, 3 in all_reduce"),  # the network itself
    ],
)
def test_the_rank_that_holds_up_the_others_is_named(said: dict[int, Any], blamed: str) -> None:
    assert hang_report(said, 4, 30.0).startswith(f"no step for 30 s: {blamed}")


def test_a_rank_is_slow_beside_those_of_its_own_stage() -> None:
    assert stragglers([0, 0, 0, 0], [0.5, 0.98, 0.55, 0.5]).keys() == {1}
    assert stragglers([0, 0, 0, 0], [0.5, 0.6, 0.55, 0.5]) == {}  # 0.5 of 0.6 is the usual speed, within the noise
    assert stragglers([0, 0, 1, 1], [0.3, 0.3, 0.98, 0.98]) == {}  # a heavy stage is no slow rank
    assert stragglers([0, 0], [0.5, 0.98]).keys() == {1}
    assert stragglers([0], [1.0]) == {}


def test_a_thread_in_a_collective_is_seen_there() -> None:
    store, thread_seen = dist.HashStore(), {}
    waiting = threading.Event()

    def wait() -> None:
        thread_seen["id"] = threading.get_ident()
        waiting.set()
        with contextlib.suppress(dist.DistStoreError):
            dist.distributed_c10d._store_based_barrier(0, store, "b", 2, timedelta(seconds=2))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    waiting.wait()
    time.sleep(0.3)
    assert stack_position(thread_seen["id"])["collective"] == "store_based_barrier"
    assert stack_position(threading.get_ident())["collective"] == ""
    thread.join()
