"""Notice to leave: a signal that announces an end, or a run's own time limit."""

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType

from megahp.exit_codes import STOPPED
from megahp.launch import is_local_rank0, is_repeat, notice_signals


def leave_at_notice() -> None:
    """Until somebody else listens, end this process with STOPPED at a notice: there is nothing to save yet.

    A thread does it where the main one waits in C++, for other ranks say, and would run no handler: the interpreter
    writes the signal's number to a pipe at once.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if is_local_rank0():
            told = f"megahp: told to leave by {signal.Signals(number).name} while nothing was training\n"
            with contextlib.suppress(OSError):  # a terminal that was closed
                os.write(2, told.encode())
        os._exit(STOPPED)

    def watch() -> None:
        while number := os.read(reading, 1):
            if signal.getsignal(number[0]) is leave:
                leave(number[0], None)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in notice_signals():
        signal.signal(number, leave)
    threading.Thread(target=watch, name="megahp-notice", daemon=True).start()


class Notice:
    """Whether this rank has been told to leave. The signal is only noted, so that a step can end; a later one
    ends the process at once, as it would have without us."""

    def __init__(self, minutes: float, began: float) -> None:
        """minutes: after so many since `began`, of time.monotonic, notice is given by ourselves; 0 = never."""
        self.why = ""
        self.first = math.inf  # when a signal came
        self.end = began + 60 * minutes if minutes else math.inf
        for number in notice_signals():
            signal.signal(number, self._note)

    @property
    def given(self) -> bool:
        if not self.why and time.monotonic() >= self.end:
            self.why = "resilience.stop_after has passed"
        return bool(self.why)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if is_repeat(number, now - self.first):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.why, self.first = f"signal {signal.Signals(number).name}", min(now, self.first)
