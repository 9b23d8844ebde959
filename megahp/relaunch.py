"""After a fault: the whole job again, on a new port, from the newest sound checkpoint. (A launcher that restarts single
ranks in place is not dependable: gloo's and NCCL's connections rarely recover.)"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megahp.checkpoint import complete
from megahp.exit_codes import FINAL, NO_PROGRESS

FUTILE = 3  # relaunches in a row that end without a new checkpoint


def until_done(start: Callable[[bool], int], run: Path, restarts: int) -> int:
    """Start a run, and again after each fault, as often as there are restarts left and they lead on.

    start(resume) returns an exit code. Returns the last one's, or NO_PROGRESS.
    """
    code, futile, before = start(False), 0, None
    for number in range(1, restarts + 1):
        if code in FINAL:
            return code
        there = complete(run / "checkpoints")
        futile = futile + 1 if there == before else 0
        if futile == FUTILE:
            _tell(f"exit code {code} again, with no new checkpoint after {FUTILE} restarts; see {run}/crashes")
            return NO_PROGRESS
        before = there
        _tell(f"exit code {code}; restart {number} of {restarts}{'' if there else ', from the beginning'}")
        code = start(True)
    return code


def _tell(text: str) -> None:
    print(f"megahp: {text}", file=sys.stderr, flush=True)
