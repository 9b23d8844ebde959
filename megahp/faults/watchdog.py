"""A thread beside each rank's training that detects hangs, and measures how much of its time the rank waits for others.

It samples the training thread's stack, which costs that thread nothing: the innermost function of torch.distributed
is the collective, the innermost line of megahp is where it is called.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median_low
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import megahp
from megahp import launch
from megahp.errors import Fault
from megahp.exit_codes import HANG
from megahp.faults.crash import report_crash

logger = logging.getLogger(__name__)

INTERVAL = 0.1  # seconds between samples
SUSPENDED = 2.0  # seconds between two samples after which this process must have been stopped in between
MIN_SAMPLES = 50
SLOW = 0.75  # a rank is slow that has less than this share of the usual speed (nvidia-resiliency-ext's threshold)
NOISE = 0.15  # of the difference of two shares, each measured in MIN_SAMPLES samples
ANSWER = 2.0  # seconds within which ranks that still run have reported where they are
OURS, THEIRS = f"{Path(megahp.__file__).parent}{os.sep}", f"{Path(dist.__file__).parent}{os.sep}"
OPERATORS = torch._ops.__file__  # through which functional collectives are called


def collective_timeout(hang_after: float) -> timedelta:
    """Return how long collectives wait before they fail: longer than the watchdog, which knows why they wait."""
    return timedelta(seconds=hang_after) + launch.TIMEOUT if hang_after else timedelta(days=1)


class Watchdog:
    """Exits this process with HANG when no step has ended for `hang_after` seconds (0 = never), after logging which
    rank stands where. Made, and used as a context, by the training thread of every rank."""

    def __init__(self, store: dist.Store, hang_after: float, directory: Path) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        # a connection of its own: the other one may be blocked in a request of the training thread's
        self.store = store.clone() if self.ranks > 1 else store  # type: ignore[attr-defined]
        self.hang_after, self.directory = hang_after, directory
        self.training = threading.get_ident()
        self.step, self.since = 0, time.monotonic()
        self.samples = self.waits = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="megahp-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def alive(self, step: int) -> None:
        """Reset the clock: this step has ended, or something else that may take hang_after seconds of its own."""
        self.step, self.since = step, time.monotonic()

    def slow_ranks(self, stage: int) -> dict[int, str] | None:
        """Return the ranks that the others of their pipeline stage wait for, each with the measured shares; None before
        there are enough samples, which are then counted anew. A collective: equal on all ranks."""
        counts = [torch.zeros(3, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(counts, torch.tensor([stage, self.samples, self.waits]))
        stages, samples, waits = torch.stack(counts).T
        if samples.min() < MIN_SAMPLES:
            return None
        self.samples = self.waits = 0
        return stragglers(stages.tolist(), (1 - waits / samples).tolist())

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.stopped.wait(INTERVAL):
            now = time.monotonic()
            if now - before > SUSPENDED:  # suspended by Slurm, say, and other ranks with it: that time is not a hang
                self.since += now - before
            before = now
            position = stack_position(self.training)
            self.samples += 1
            self.waits += bool(position["collective"])
            if self.hang_after and time.monotonic() - self.since > self.hang_after:
                self._exit({"step": self.step, **position})

    def _exit(self, position: Mapping[str, Any]) -> None:
        """Log where all ranks stand that report it in time, once for all, and exit."""
        names, frames = {thread.ident: thread.name for thread in threading.enumerate()}, sys._current_frames()
        stacks = {names.get(ident, str(ident)): traceback.format_stack(frame) for ident, frame in frames.items()}
        lines = [f"no step for {self.hang_after:g} s; step {self.step}"]
        for name in sorted(stacks, key="MainThread".__eq__):  # training's last, where a reader looks first
            lines.append(f"thread {name}\n{''.join(stacks[name])}")
        report_crash(self.directory, self.rank, "\n".join(lines))
        # a request to the store blocks where the rank that holds it is the one that hangs
        threading.Timer(2 * ANSWER, self._exit_alone, [position]).start()
        try:
            self.store.set(f"hang {self.rank}", json.dumps(position))
            deadline, reports = time.monotonic() + ANSWER, dict[int, Any]()
            while len(reports) < self.ranks and time.monotonic() < deadline:
                for rank in range(self.ranks):
                    if rank not in reports and self.store.check([f"hang {rank}"]):
                        reports[rank] = json.loads(self.store.get(f"hang {rank}"))
                time.sleep(INTERVAL / 2)
            if launch.claim_report(self.store, "hang"):
                logger.error(hang_report(reports, self.ranks, self.hang_after))
        except (RuntimeError, Fault):
            self._exit_alone(position)
        os._exit(HANG)

    def _exit_alone(self, position: Mapping[str, Any]) -> None:
        """Log where this rank stands, and exit."""
        why = f"no step for {self.hang_after:g} s, and no answer from the rank that holds the ranks' store"
        logger.error(f"{why}; rank {self.rank} {_where(position)}")
        os._exit(HANG)


def stack_position(thread: int) -> dict[str, str]:
    """Return where a thread of this process stands: the collective it is in, if any, and the line of megahp that called
    it."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame and frame.f_code.co_filename == OPERATORS:
        frame = frame.f_back
    collective = frame.f_code.co_name if frame and frame.f_code.co_filename.startswith(THEIRS) else ""
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    line = f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""
    return {"collective": collective.lstrip("_"), "line": line or "no line of megahp"}


def stragglers(stages: Sequence[int], busy: Sequence[float]) -> dict[int, str]:
    """Return the ranks that are much busier than the median of their stage: the others wait for them.

    busy: each rank's share of time in which it does not wait. Stages are apart, since a heavy one is busier by right.
    """
    slow = {}
    for rank, (stage, share) in enumerate(zip(stages, busy, strict=True)):
        usual = median_low(other for other_stage, other in zip(stages, busy, strict=True) if other_stage == stage)
        if usual < SLOW * share and share - usual > NOISE:
            slow[rank] = f"rank {rank} works for {share:.0%} of the time, where half of its stage's do for {usual:.0%}"
    return slow


def hang_report(reports: Mapping[int, Mapping[str, Any]], ranks: int, seconds: float) -> str:
    """Return in one line who holds up the others: ranks that do not answer; else those that are in no collective; else
    those in another one than most."""
    silent = [rank for rank in range(ranks) if rank not in reports]
    elsewhere = [rank for rank, position in reports.items() if not position["collective"]]
    calls = {rank: (each["step"], each["collective"], each["line"]) for rank, each in reports.items()}
    usual = Counter(calls.values()).most_common(1)[0][0]
    odd = [rank for rank, call in calls.items() if call != usual]
    blamed = silent or elsewhere or odd
    parts = [
        f"rank {rank} {'does not answer' if rank in silent else f'was {_where(reports[rank])}'}" for rank in blamed
    ]
    waiting = [rank for rank in reports if rank not in blamed]
    if waiting:
        parts.append(f"rank {', '.join(map(str, waiting))} {_where(reports[waiting[0]])}")
    return f"no step for {seconds:g} s: {'; '.join(parts)}; stacks are in crashes/"


def _where(position: Mapping[str, Any]) -> str:
    doing = f"in {position['collective']}, called at" if position["collective"] else "in no collective, at"
    return f"{doing} {position['line']}, after step {position['step']}"
