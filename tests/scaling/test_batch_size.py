"""The batch plan: every sample once, on any layout, whatever the batch does."""

from __future__ import annotations

import numpy as np
import pytest

from megahp.config import Config, with_values
from megahp.scaling import schedules
from megahp.scaling.batch_size import Progress, plan_step, runnable


def settings(global_batch: int, micro_batch: int = 2, tokens: int = 16 * 240) -> Config:
    return with_values(
        Config(),
        {
            "data.sequence_length": 16,
            "batch.global_batch": global_batch,
            "batch.micro_batch": micro_batch,
            "train.tokens": tokens,
        },
    )


@pytest.mark.parametrize(
    ("batch", "dp", "micro", "expected"),
    [
        (32, 2, 4, (32,)),
        (30, 2, 4, (24, 32)),
        (3, 2, 4, (8,)),
        (8, 1, 8, (8,)),
    ],
)
def test_runnable_names_the_nearest_batches(batch: int, dp: int, micro: int, expected: tuple[int, ...]) -> None:
    assert runnable(batch, dp, micro) == expected


def test_no_sample_is_repeated_or_skipped_when_batch_and_layout_change() -> None:
    progress, seen = Progress(), []
    for batch, micro, dp, steps in [(8, 2, 1, 3), (16, 4, 2, 2), (24, 1, 4, 2), (12, 3, 2, 3)]:
        for _ in range(steps):
            plan = plan_step(settings(batch, micro), progress)
            assert plan is not None
            ids = [plan.samples(rank, dp) for rank in range(dp)]
            assert {len(part) for parts in ids for part in parts} == {micro}
            assert {len(parts) for parts in ids} == {plan.microbatches(dp)}
            seen.append(np.sort(np.concatenate([part for parts in ids for part in parts])))
            progress = progress.after(plan)
    assert np.array_equal(np.concatenate(seen), np.arange(progress.samples))
    assert progress.tokens == progress.samples * 16


def test_the_run_ends_at_its_tokens_or_at_its_steps() -> None:
    progress = Progress()
    while plan := plan_step(settings(32), progress):
        progress = progress.after(plan)
    assert (progress.step, progress.samples) == (7, 224)  # an eighth batch would exceed 240 samples
    assert plan_step(with_values(settings(32), {"train.steps": 3}), Progress(3, 96, 96 * 16)) is None


def test_the_mean_learning_rate_does_not_depend_on_the_batch() -> None:
    means = []
    for batch in (2, 8, 40):
        progress, rates = Progress(), []
        chosen = with_values(settings(batch), {"schedule.warmup": 1 / 3})
        while plan := plan_step(chosen, progress):
            rates.append(plan.lr / chosen.optimizer.lr)
            progress = progress.after(plan)
        means.append(np.mean(rates))
    assert means == pytest.approx([0.5] * 3)
    assert schedules.fraction(chosen.schedule, 0, 1) == 0.0
