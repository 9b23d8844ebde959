"""Notice to leave: a signal that announces an end, or a run's own time limit."""

import math
import signal
import time
from types import FrameType

from megahp.launch import NOTICES, SAME


class Notice:
    """Whether this rank has been told to leave. The signal is only noted, so that a step can end; a later one of the
    same kind ends the process at once, as it would have without us."""

    def __init__(self, minutes: float) -> None:
        """minutes: after so many notice is given by ourselves; 0 = never."""
        self.why = ""
        self.first = math.inf  # when a signal came
        self.end = time.monotonic() + 60 * minutes if minutes else math.inf
        for number in NOTICES:
            signal.signal(number, self._note)

    @property
    def given(self) -> bool:
        if not self.why and time.monotonic() >= self.end:
            self.why = "resilience.stop_after has passed"
        return bool(self.why)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self.first > SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.why, self.first = f"signal {signal.Signals(number).name}", min(now, self.first)
