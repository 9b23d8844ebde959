"""When a job is started again, and when no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megahp import exit_codes
from megahp.faults.relaunch import until_done


def outcome(run: Path, lives: Iterator[tuple[int, int]], restarts: int) -> tuple[int, list[bool]]:
    """Exit code and how each start was made, of a run whose lives end at (step of the newest checkpoint, exit code)."""
    starts = []

    def start(resume: bool) -> int:
        starts.append(resume)
        step, code = next(lives)
        if step:
            (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
        return code

    return until_done(start, run, restarts), starts


@pytest.mark.parametrize("code", [0, 2, 75, 130, 143, 138])
def test_what_is_final_is_not_repeated(tmp_path: Path, code: int) -> None:
    assert outcome(tmp_path, iter([(1, code)]), 9) == (code, [False])


def test_a_fault_is_followed_by_a_start_that_resumes(tmp_path: Path) -> None:
    assert outcome(tmp_path, iter([(0, 137), (2, 76), (4, 0)]), 9) == (0, [False, True, True])


def test_the_budget_ends(tmp_path: Path) -> None:
    assert outcome(tmp_path, ((n, 1) for n in range(1, 99)), 4) == (1, [False, *[True] * 4])


def test_it_stops_where_nothing_is_gained(tmp_path: Path) -> None:
    """Three restarts in a row from the same place, then somebody must look; a step forward begins the count again."""
    lives = [(0, 1), (0, 1), (3, 1), (3, 1), (3, 1), (3, 1), (3, 1), (3, 1)]
    code, starts = outcome(tmp_path, iter(lives), 99)
    assert code == exit_codes.NO_PROGRESS == 93
    assert len(starts) == 2 + 1 + 3


def test_a_run_that_never_saves_is_started_three_times_more(tmp_path: Path) -> None:
    code, starts = outcome(tmp_path, iter([(0, 1)] * 9), 99)
    assert code == 93 and len(starts) == 1 + 3
