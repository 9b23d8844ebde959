"""The batch plan: its steps, and its change to another length, layout or policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scaling.batch.schedulers import NOISE, SAVED, TOKENS, config, run

from megahp.scaling.batch import BatchScheduler, Progress


def test_the_run_ends_at_its_tokens_or_at_its_steps() -> None:
    steps = run(BatchScheduler(config(32), 1))
    assert len(steps) == 7  # an eighth batch would exceed 240 samples
    assert BatchScheduler(config(32, train__steps=3), 1).step(Progress(3, 96, 96 * 16)) is None


def test_the_mean_learning_rate_does_not_depend_on_the_batch() -> None:
    means = []
    for batch in (2, 8, 40):
        plan, progress, rates = BatchScheduler(config(batch, schedule__warmup=1 / 3), 1), Progress(), []
        while step := plan.step(progress):
            rates.append(step.lr / plan.config.optimizer.lr)
            progress = progress.after(step)
        means.append(np.mean(rates))
    assert means == pytest.approx([0.5] * 3)


BTLM = {
    "data__sequence_length": 2048,
    "data__lengths": ("470.785e9:8192",),
    "schedule__name": "linear",
    "schedule__warmup": 95 / 159_636,
    "schedule__floor": 0.00010138 / 0.012,
    "optimizer__lr": 0.012,
}


def test_btlm_changes_its_length_at_equal_tokens_per_step() -> None:
    """check 25: 1,920 x 2,048, then 480 x 8,192; 470.79B and 156.93B tokens; the rate at the end."""
    plan = BatchScheduler(config(1920, 8, tokens=159_636 * 3_932_160, **BTLM), 4)
    progress, lengths = Progress(), {2048: 0, 8192: 0}
    while step := plan.step(progress):
        assert (step.global_batch, step.tokens) == (1920 * 2048 // step.length, 3_932_160)
        assert step.micro_batch * step.length == 8 * 2048 and step.num_microbatches(4) == 60
        lengths[step.length] += step.tokens
        progress, last = progress.after(step), step
    assert [round(tokens / 1e7) for tokens in lengths.values()] == [47079, 15693]
    assert (progress.step, progress.samples) == (159_636, 119_727 * 1920 + 39_909 * 480)
    assert last.lr == pytest.approx(0.0001014, abs=5e-8)


def test_sqrt_waits_until_beta2_may_change() -> None:
    table = {"batch__policy": "table", "batch__table": ("16:4",), "batch__rule": "sqrt"}
    steps = run(BatchScheduler(config(2, 2, tokens=16 * 1000, **table), 1))
    assert [before.step + 1 for before, _, change in steps if change] == [200]  # 10 / (1 - 0.95)


@pytest.mark.parametrize(("largest", "expected"), [(64, 16), (15, 8), (16, 16)])
def test_a_state_moves_to_a_layout_that_cannot_run_its_batch(largest: int, expected: int) -> None:
    """Up, or where that would exceed the limit down; and the change says why."""
    plan = BatchScheduler(config(8, 4, tokens=TOKENS, **{**NOISE, "batch__largest": largest}), 2)
    (change,) = plan.load_state(SAVED, Progress(50, 400, 6400))
    assert (change.before, change.now, plan.batch) == (12, expected, expected)
    assert "layout" in change.reason and change.hyperparameters_now == plan.hyperparameters(expected * 16)
    assert BatchScheduler(config(8, 4, tokens=TOKENS), 2).load_state({**SAVED, "batch": 8}, Progress()) == []


@pytest.mark.parametrize(
    "policy", [NOISE | {"batch__look_every": 7}, {"batch__policy": "table"}], ids=["noise", "table"]
)
def test_the_next_decision_is_as_many_steps_away_as_are_said(policy: dict[str, Any]) -> None:
    scheduler = BatchScheduler(config(4, tokens=TOKENS, **policy), 1)
    for step in range(20):
        ahead = scheduler.steps_to_decision(step)
        decides = [not scheduler.policy.measures or scheduler.is_decision_step(step + n) for n in range(1, ahead + 1)]
        assert decides == [False] * (ahead - 1) + [True]
    assert BatchScheduler(config(4), 1).steps_to_decision(3) > 10**18  # a constant batch is never decided on


def test_a_policy_that_is_behind_catches_up_at_once() -> None:
    plan = BatchScheduler(config(4, 2, batch__policy="table", batch__table=("320:8", "640:12")), 1)
    (change,) = plan.load_state({**SAVED, "batch": 4}, Progress(10, 40, 640))
    assert (change.before, change.now) == (4, 12)
