"""Restarts after a fault: the whole job again, on a new port, from the newest valid checkpoint. (A launcher that
restarts single ranks in place is not dependable: gloo's and NCCL's connections rarely recover.)"""

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from megahp.checkpoint import complete
from megahp.exit_codes import FINAL, NO_PROGRESS

logger = logging.getLogger(__name__)

FUTILE = 3  # restarts in a row that end without a new checkpoint


def until_done(start: Callable[[bool], int], run: Path, restarts: int) -> int:
    """Start a run, and again after each fault, while restarts are left and lead to new checkpoints.

    start(resume) returns an exit code. Returns the last one's, or NO_PROGRESS.
    """
    history: list[list[str]] = []
    while (code := start(bool(history))) not in FINAL:
        history.append(checkpoints(run))
        if (end := exit_or_restart(code, history, restarts, run)) is not None:
            return end
    return code


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints, oldest first."""
    return [path.name for path in complete(run / "checkpoints")]


def exit_or_restart(code: int, history: Sequence[list[str]], restarts: int, run: Path) -> int | None:
    """Return the exit code to end with after a fault, or None to restart. history: the run's checkpoints after each
    fault so far, this one the last."""
    same = len(list(takewhile(lambda names: names == history[-1], reversed(history))))
    if same > FUTILE:
        logger.error(f"exit code {code} again, with no new checkpoint after {FUTILE} restarts; see {run}/crashes")
        return NO_PROGRESS
    if len(history) > restarts:
        return code
    from_scratch = "" if history[-1] else ", from the beginning"
    logger.warning(f"exit code {code}; restart {len(history)} of {restarts}{from_scratch}")
    return None
