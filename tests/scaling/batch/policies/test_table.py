"""A batch that follows a table."""

from __future__ import annotations

import math

import numpy as np
from scaling.batch.schedulers import config, run

from megahp.scaling.batch import BatchScheduler, Progress


def test_table_is_followed_at_its_tokens() -> None:
    plan = BatchScheduler(config(4, 2, batch__policy="table", batch__table=("640:8", "1e3:13")), 1)
    steps = run(plan)
    assert [(before.tokens, size) for before, size, change in steps[:1]] == [(0, 4)]
    grown = [(before.tokens + size * 16, change.before, change.now) for before, size, change in steps if change]
    assert grown == [(640, 4, 8), (1024, 8, 12)]  # 13 is not runnable; 12 is the largest below


def test_a_linear_ramp_of_accumulation_is_a_table() -> None:
    """check 23: accumulation from 2 to 15 over the run, in ten points, rounded up."""
    tokens = 16 * 15 * 400
    points = np.linspace(0, tokens, 14)[1:]
    table = tuple(f"{at:.0f}:{math.ceil(np.interp(at, [0, tokens], [2, 15]))}" for at in points)
    plan = BatchScheduler(config(2, 1, tokens=tokens, batch__policy="table", batch__table=table), 1)
    steps = run(plan)
    sizes = [size for _, size, _ in steps]
    assert (sizes[0], sizes[-1], sizes) == (2, 14, sorted(sizes))
    change = plan.update(Progress(len(sizes), sum(sizes), tokens), None)
    assert change is not None and change.now == 15
