"""A thread beside each rank's training that sees when it stands still, and how much of its time it waits for others.

It looks at the training thread's stack, which costs that thread nothing: the innermost function of torch.distributed
is the collective, the innermost line of megahp is where it is called.
"""

from __future__ import annotations

import json
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

LOOK = 0.1  # seconds between looks
ASLEEP = 2.0  # seconds without a look in which this process did not run at all
ENOUGH_LOOKS = 50
SLOW = 0.75  # a rank is slow that has less than this share of the usual speed (nvidia-resiliency-ext's threshold)
NOISE = 0.15  # of two shares of so many looks
ANSWER = 2.0  # seconds in which ranks that still can have said where they are
OURS, THEIRS = f"{Path(megahp.__file__).parent}{os.sep}", f"{Path(dist.__file__).parent}{os.sep}"
OPERATORS = torch._ops.__file__  # through which functional collectives are called


def collective_timeout(hang_after: float) -> timedelta:
    """How long collectives wait before they fail: longer than the watchdog, which says why."""
    return timedelta(seconds=hang_after) + launch.TIMEOUT if hang_after else timedelta(days=1)


class Watchdog:
    """Ends this process, with exit code HANG, when no step has ended for `hang_after` seconds (0 = never), having said
    which rank stands where. Made, and used as a context, by the training thread of every rank."""

    def __init__(self, store: dist.Store, hang_after: float, directory: Path) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.store = store.clone() if self.ranks > 1 else store  # type: ignore[attr-defined]  # a connection of its own: the other may be waiting
        self.hang_after, self.directory = hang_after, directory
        self.training = threading.get_ident()
        self.step, self.since = 0, time.monotonic()
        self.looks = self.waits = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="megahp-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def alive(self, step: int) -> None:
        """Say that this step has ended, or something else that takes its time."""
        self.step, self.since = step, time.monotonic()

    def slow_ranks(self, stage: int) -> dict[int, str] | None:
        """The ranks the others of their pipeline stage wait for, and how that shows; equal on all ranks, which all call
        it. None before there have been enough looks; then they are counted anew."""
        counts = [torch.zeros(3, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(counts, torch.tensor([stage, self.looks, self.waits]))
        stages, looks, waits = torch.stack(counts).T
        if looks.min() < ENOUGH_LOOKS:
            return None
        self.looks = self.waits = 0
        return stragglers(stages.tolist(), (1 - waits / looks).tolist())

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.stopped.wait(LOOK):
            now = time.monotonic()
            if now - before > ASLEEP:  # this process was stopped, by a job that Slurm suspended say, and ranks with it
                self.since += now - before
            before = now
            place = stack_position(self.training)
            self.looks += 1
            self.waits += bool(place["collective"])
            if self.hang_after and time.monotonic() - self.since > self.hang_after:
                self._end(place)

    def _end(self, place: Mapping[str, str]) -> None:
        """Say where all ranks are, as far as they can, and leave."""
        report_crash(self.directory, self.rank, f"no step for {self.hang_after:g} s; step {self.step}\n{_stacks()}")
        own = {"step": self.step, **place}
        unanswered = threading.Timer(2 * ANSWER, self._end_alone, [own])  # the store's rank may be the one that hangs
        unanswered.start()
        try:
            said = self._exchange(own)
            if launch.is_first_to_report(self.store, "hang"):
                print(f"megahp: {hang_report(said, self.ranks, self.hang_after)}", file=sys.stderr, flush=True)
        except (RuntimeError, Fault):
            self._end_alone(own)
        os._exit(HANG)

    def _end_alone(self, own: Mapping[str, Any]) -> None:
        """Say where this rank is, and leave."""
        why = f"no step for {self.hang_after:g} s, and no answer from the rank that holds the ranks' store"
        print(f"megahp: {why}; rank {self.rank} {_where(own)}", file=sys.stderr, flush=True)
        os._exit(HANG)

    def _exchange(self, own: Mapping[str, Any]) -> dict[int, Any]:
        """What each rank says that has come to the same end; those that do not answer in time are missing."""
        self.store.set(f"hang {self.rank}", json.dumps(own))
        deadline = time.monotonic() + ANSWER
        waited_for, said = set(range(self.ranks)), {}
        while waited_for and time.monotonic() < deadline:
            for rank in [rank for rank in waited_for if self.store.check([f"hang {rank}"])]:
                said[rank] = json.loads(self.store.get(f"hang {rank}"))
                waited_for.remove(rank)
            time.sleep(LOOK / 2)
        return said


def stack_position(thread: int) -> dict[str, str]:
    """Where a thread of this process stands: the collective it is in, if it is in one, and the line of ours that
    called it."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame and frame.f_code.co_filename == OPERATORS:
        frame = frame.f_back
    collective = frame.f_code.co_name if frame and frame.f_code.co_filename.startswith(THEIRS) else ""
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    line = f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""
    return {"collective": collective.lstrip("_"), "line": line or "no line of megahp"}


def stragglers(stages: Sequence[int], busy: Sequence[float]) -> dict[int, str]:
    """The ranks that are much busier than the median of their stage. busy: share of its time a rank does not wait."""
    found = {}
    for rank, (stage, share) in enumerate(zip(stages, busy, strict=True)):
        usual = median_low(other for own, other in zip(stages, busy, strict=True) if own == stage)
        if usual < SLOW * share and share - usual > NOISE:
            found[rank] = f"rank {rank} works for {share:.0%} of the time, where half of its stage's do for {usual:.0%}"
    return found


def hang_report(said: Mapping[int, Mapping[str, Any]], ranks: int, seconds: float) -> str:
    """Who holds up the others, in one line: ranks that do not answer; else those that are in no collective; else those
    in another than most."""
    silent = [rank for rank in range(ranks) if rank not in said]
    elsewhere = [rank for rank, own in said.items() if not own["collective"]]
    calls = {rank: (own["step"], own["collective"], own["line"]) for rank, own in said.items()}
    usual = Counter(calls.values()).most_common(1)[0][0]
    odd = [rank for rank, call in calls.items() if call != usual]
    blamed = silent or elsewhere or odd
    told = [f"rank {rank} {'does not answer' if rank in silent else f'was {_where(said[rank])}'}" for rank in blamed]
    waiting = [rank for rank in said if rank not in blamed]
    if waiting:
        told.append(f"rank {', '.join(map(str, waiting))} {_where(said[waiting[0]])}")
    return f"no step for {seconds:g} s: {'; '.join(told)}; stacks are in crashes/"


def _where(own: Mapping[str, Any]) -> str:
    doing = f"in {own['collective']}, called at" if own["collective"] else "in no collective, at"
    return f"{doing} {own['line']}, after step {own['step']}"


def _stacks() -> str:
    """The stacks of all threads of this process, that of training last."""
    names, frames = {thread.ident: thread.name for thread in threading.enumerate()}, sys._current_frames()
    stacks = {names.get(ident, str(ident)): traceback.format_stack(frame) for ident, frame in frames.items()}
    return "\n".join(f"thread {name}\n{''.join(stacks[name])}" for name in sorted(stacks, key="MainThread".__eq__))
