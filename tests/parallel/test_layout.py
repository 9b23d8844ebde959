"""The layout that a number of ranks gives."""

from __future__ import annotations

import pytest

from megahp.config import ParallelConfig
from megahp.errors import UserError
from megahp.parallel.layout import Layout, fit


@pytest.mark.parametrize(
    ("parallel", "ranks", "layout"),
    [
        (ParallelConfig(), 1, Layout()),
        (ParallelConfig(tp=2), 8, Layout(tp=2, dp_shard=4)),
        (ParallelConfig(tp=2, dp_replicate=0, dp_shard=2), 8, Layout(tp=2, dp_shard=2, dp_replicate=2)),
        (ParallelConfig(tp=2, cp=4), 16, Layout(tp=2, cp=4, dp_shard=2)),
        (ParallelConfig(tp=2, ep=2), 8, Layout(tp=2, dp_shard=4, ep=2)),
    ],
)
def test_data_parallelism_fills_what_is_left(parallel: ParallelConfig, ranks: int, layout: Layout) -> None:
    assert fit(parallel, ranks) == layout


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (ParallelConfig(tp=4), 6, "nearest: 4, 8"),
        (ParallelConfig(tp=2, dp_shard=2), 2, "needs 4 ranks"),
        (ParallelConfig(ep=4, dp_replicate=2), 12, "parallel.ep = 4 does not divide the 6 ranks of parallel.dp_shard"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks_is_refused(parallel: ParallelConfig, ranks: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(parallel, ranks)
