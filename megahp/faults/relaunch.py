"""After a fault: the whole job again, on a new port, from the newest sound checkpoint. (A launcher that restarts single
ranks in place is not dependable: gloo's and NCCL's connections rarely recover.)"""

import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from megahp.checkpoint import complete
from megahp.exit_codes import FINAL, NO_PROGRESS

FUTILE = 3  # relaunches in a row that end without a new checkpoint


def until_done(start: Callable[[bool], int], run: Path, restarts: int) -> int:
    """Start a run, and again after each fault, as often as there are restarts left and they lead on.

    start(resume) returns an exit code. Returns the last one's, or NO_PROGRESS.
    """
    found = list[list[str]]()
    while (code := start(bool(found))) not in FINAL:
        found.append(checkpoints(run))
        if (end := exit_or_restart(code, found, restarts, run)) is not None:
            return end
    return code


def checkpoints(run: Path) -> list[str]:
    """The names of a run's checkpoints, oldest first."""
    return [path.name for path in complete(run / "checkpoints")]


def exit_or_restart(code: int, found: Sequence[list[str]], restarts: int, run: Path) -> int | None:
    """After a fault: the exit code to end with, or None to start again. found: the run's checkpoints after each fault
    so far, this one the last."""
    same = len(list(takewhile(lambda names: names == found[-1], reversed(found))))
    if same > FUTILE:
        _tell(f"exit code {code} again, with no new checkpoint after {FUTILE} restarts; see {run}/crashes")
        return NO_PROGRESS
    if len(found) > restarts:
        return code
    _tell(f"exit code {code}; restart {len(found)} of {restarts}{'' if found[-1] else ', from the beginning'}")
    return None


def _tell(text: str) -> None:
    print(f"megahp: {text}", file=sys.stderr, flush=True)
