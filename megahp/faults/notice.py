"""Requests to stop: a signal that announces the process's end, or a run's own time limit."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType

from megahp.exit_codes import STOPPED
from megahp.launch import is_local_rank0, is_repeat, notice_signals


def exit_on_signals() -> None:
    """Let a signal end this process with STOPPED, until a Notice or a launcher handles signals: there is nothing to
    save yet.

    A Python handler runs in the main thread alone, which may be waiting in C++, for other ranks say. So a thread reads
    the signal's number from a pipe, to which the interpreter writes it at once.
    """

    def exit_stopped(number: int, frame: FrameType | None) -> None:
        if is_local_rank0():
            message = f"megahp: stopped by {signal.Signals(number).name} while nothing was training\n"
            with contextlib.suppress(OSError):  # a terminal that was closed
                os.write(2, message.encode())  # not print or logging, whose locks the interrupted thread may hold
        os._exit(STOPPED)

    def watch() -> None:
        while number := os.read(reading, 1):
            # the pipe receives every signal for good, also those that others handle by now
            if signal.getsignal(number[0]) is exit_stopped:
                exit_stopped(number[0], None)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in notice_signals():
        signal.signal(number, exit_stopped)
    threading.Thread(target=watch, name="megahp-notice", daemon=True).start()


class Notice:
    """Whether this rank was asked to stop. A signal is only noted, so that the step can end and be saved; a second one
    ends the process at once, as it would have without us."""

    def __init__(self, minutes: float, start: float) -> None:
        """minutes: resilience.stop_after, counted from `start` of time.monotonic; 0 = never."""
        self.reason = ""
        self.first = math.inf  # when the first signal came
        self.end = start + 60 * minutes if minutes else math.inf
        for number in notice_signals():
            signal.signal(number, self._note)

    @property
    def given(self) -> bool:
        if not self.reason and time.monotonic() >= self.end:
            self.reason = "resilience.stop_after has passed"
        return bool(self.reason)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if is_repeat(number, now - self.first):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.reason, self.first = f"signal {signal.Signals(number).name}", min(now, self.first)
