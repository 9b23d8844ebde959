"""The batch sizes that a layout can run."""

from __future__ import annotations

import pytest
from scaling.batch.schedulers import config, run

from megahp.scaling.batch import BatchScheduler, batch_multiple, runnable


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
