"""The layout that a number of ranks gives."""

from __future__ import annotations

import pytest

from megahp import config
from megahp.errors import UserError
from megahp.parallel.layout import Layout, fit


@pytest.mark.parametrize(
    ("parallel", "ranks", "layout"),
    [
        (config.Parallel(), 1, Layout()),
        (config.Parallel(tp=2), 8, Layout(tp=2, dp_shard=4)),
        (config.Parallel(tp=2, dp_replicate=0, dp_shard=2), 8, Layout(tp=2, dp_shard=2, dp_replicate=2)),
        (config.Parallel(tp=2, cp=4), 16, Layout(tp=2, cp=4, dp_shard=2)),
        (config.Parallel(tp=2, ep=2), 8, Layout(tp=2, dp_shard=4, ep=2)),
    ],
)
def test_data_parallelism_fills_what_is_left(parallel: config.Parallel, ranks: int, layout: Layout) -> None:
    assert fit(parallel, ranks) == layout


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (config.Parallel(tp=4), 6, "nearest: 4, 8"),
        (config.Parallel(tp=2, dp_shard=2), 2, "needs 4 ranks"),
        (config.Parallel(ep=4, dp_replicate=2), 12, "parallel.ep = 4 does not divide the 6 ranks of parallel.dp_shard"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(parallel: config.Parallel, ranks: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(parallel, ranks)
