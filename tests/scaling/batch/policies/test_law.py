"""A batch that follows a law of the critical batch."""

from __future__ import annotations

import pytest
from scaling.batch.schedulers import config, run

from megahp.config import Config
from megahp.scaling import power_laws
from megahp.scaling.batch import BatchScheduler, Progress


def test_law_spreads_the_critical_batch_along_the_run() -> None:
    values = {"batch__policy": "law", "batch__target": 0.5, "data__sequence_length": 2048}
    plan = BatchScheduler(config(8, 1, tokens=2048 * 200_000, **values), 1)
    steps = run(plan)
    expected = max(8, int(0.5 * 1.462 * 0.0471 * steps[-1][0].tokens ** 0.462))
    assert abs(steps[-1][1] - expected) <= 1
    sizes = [size for _, size, _ in steps]
    assert sizes == sorted(sizes) and sizes[-1] > 20 * sizes[0]


def test_the_law_is_the_papers_unless_the_run_has_its_own() -> None:
    paper = power_laws.CRITICAL_BATCH
    assert Config().batch.critical_batch == pytest.approx((paper.scale, paper.exponent), rel=1e-12)
    values = {"batch__policy": "law", "batch__target": 0.5, "batch__critical_batch": (3.0, 0.5)}
    asked = BatchScheduler(config(8, **values), 1).target(Progress(tokens=400), None)
    assert asked == pytest.approx(0.5 * 1.5 * 3 * 400**0.5 / 16)
