"""The frontier of time against compute."""

from __future__ import annotations

import numpy as np
import pytest
from recipe.test_recipe import LAWS

from megahp.recipe import pareto
from megahp.scaling import power_laws


def test_the_frontier_is_what_nothing_beats() -> None:
    """Against comparing each with each; Power Lines: below 20 tokens per parameter all are beaten."""
    loss, critical = LAWS.loss, power_laws.CRITICAL_BATCH
    found = pareto.frontier(2.6, loss, critical, points=60)
    least = [power_laws.least_tokens(d, b, critical) for d, b in zip(found.tokens, found.batch, strict=True)]
    assert loss(found.parameters, np.array(least)) == pytest.approx(2.6)
    assert found.compute == pytest.approx(6 * found.parameters * found.tokens)
    assert found.time == pytest.approx(found.parameters * found.tokens / found.batch)
    rng = np.random.default_rng(0)
    n = rng.uniform(2.5e8, 4e9, 2000)
    d_min = (loss.b / (2.6 - loss.floor - loss.a / n**loss.alpha)) ** (1 / loss.beta)
    share = 10 ** rng.uniform(-2, 1, 2000)
    compute, time = 6 * n * d_min * (1 + share), n * d_min / critical(d_min) * (1 + 1 / share)
    beaten = (found.compute[:, None] > 1.02 * compute) & (found.time[:, None] > 1.02 * time)
    assert not beaten.any()
    ratio = found.tokens / found.parameters
    assert 18 < ratio.min() < 27 and (np.diff(found.time) < 0).all()
