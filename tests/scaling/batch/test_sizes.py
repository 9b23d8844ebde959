"""The batch sizes that a layout can run."""

from __future__ import annotations

import pytest
from scaling.batch.schedulers import config, run

from megahp.scaling.batch import BatchScheduler, Progress, batch_multiple, largest_micro_batch, runnable


@pytest.mark.parametrize(
    ("batch", "dp", "micro", "expected"), [(32, 2, 4, (32,)), (30, 2, 4, (24, 32)), (3, 2, 4, (8,)), (8, 1, 8, (8,))]
)
def test_runnable_names_the_nearest_batches(batch: int, dp: int, micro: int, expected: tuple[int, ...]) -> None:
    assert runnable(batch, dp * micro) == expected


def test_a_batch_is_one_that_every_length_can_run() -> None:
    """With microbatches of one sequence, four times the length needs four times the tokens."""
    chosen = config(8, 1, data__lengths=("640:64",))
    assert (
        batch_multiple(chosen, 2),
        batch_multiple(config(8, 4, data__lengths=("640:64",)), 2),
        batch_multiple(config(8, 1), 2),
    ) == (8, 8, 2)
    plan = BatchScheduler(chosen, 2)
    sizes = [(before.tokens, size) for before, size, _ in run(plan)]
    assert sizes[:6] == [(128 * k, 8 if k < 5 else 2) for k in range(6)]
    short = BatchScheduler(config(2, 1, tokens=16 * 8, data__sequence_length=16, data__lengths=("32:4",)), 1)
    assert [size for _, size, _ in run(short)] == [2, 8, 8, 8]


def test_microbatches_that_follow_the_batch_let_it_be_any_multiple_of_the_ranks() -> None:
    """Of 16 tokens a sequence, at most 96 tokens a pass; later sequences are four times as long."""
    chosen = config(6, data__lengths=("640:64",), batch__micro_batch="auto", batch__largest_micro_batch=6)
    assert batch_multiple(chosen, 3) == 12  # 3 sequences of 64
    assert batch_multiple(config(6, batch__micro_batch="auto"), 3) == 3
    assert (largest_micro_batch(chosen, 16), largest_micro_batch(chosen, 64)) == (6, 1)

    def division(batch: int, **more: object) -> tuple[int, int]:
        step = BatchScheduler(config(batch, batch__micro_batch="auto", **more), 3).step(Progress())
        assert step
        return step.micro_batch, step.num_microbatches(3)

    limit = {"batch__largest_micro_batch": 6}
    assert [division(3 * share, **limit) for share in (1, 6, 7, 12, 13)] == [(1, 1), (6, 1), (4, 2), (6, 2), (5, 3)]
    assert division(39) == (13, 1)  # not decided yet: no limit
