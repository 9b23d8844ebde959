"""The policy `measured`: never above its bounds, each phase held by its own, the optimizer's timescale kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scaling.batch.schedulers import TOKENS, at, config, run

from megahp.config import Config
from megahp.scaling import schedules
from megahp.scaling.batch import BatchScheduler, Change, Progress

MEASURED = {
    "batch__policy": "measured",
    "batch__noise_share": 1.0,
    "batch__look_every": 1,
    "batch__largest": 64,
    "schedule__warmup": 0.1,
    "optimizer__beta2": 0.5,  # with that the rule `sde` waits for 20 steps only
}
SCHEDULES = {
    "decay-to-zero": {},
    "cosine": {"schedule__name": "cosine", "schedule__floor": 0.1},
    "wsd": {"schedule__name": "wsd", "schedule__decay": 0.3, "schedule__shape": "linear"},
    "constant": {"schedule__name": "constant"},
}
FEEDS: dict[str, list[float | None]] = {
    "plenty": [1e6],
    "rising": list(np.linspace(1, 60, 1000)),
    "walk": list(12 * np.exp(np.cumsum(np.random.RandomState(0).normal(0.002, 0.1, 1000)))),
    "missing": [None if k % 3 else 40.0 for k in range(1000)],
    "spike": [6.0] * 500 + [1e9] * 5 + [6.0] * 495,
    "unknown": [None],
}


def measured(**more: object) -> Config:
    return config(8, 2, **{"tokens": TOKENS, **MEASURED, **more})


def shape(run: Config, tokens: float) -> float:
    """The rate's share of its peak once it is reached, 1 before."""
    peak = tokens >= run.schedule.warmup * TOKENS
    return schedules.fraction(run.schedule, tokens, TOKENS) if peak else 1.0


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_batch_keeps_below_every_bound(schedule: str, feed: str) -> None:
    """At each step: a multiple of the unit, monotone, at most `largest`, and drift and noise within their bounds at the
    moment it grew; tau is what it was."""
    config = measured(**SCHEDULES[schedule])
    steps = run(BatchScheduler(config, 1), FEEDS[feed])
    sizes = [size for _, size, _ in steps]
    assert sizes == sorted(sizes) and sizes[0] == 8 and max(sizes) <= 64 and all(size % 2 == 0 for size in sizes)
    for before, _, change in steps:
        if change is None:
            continue
        after = before.tokens + change.before * 16
        noise = at(FEEDS[feed], Progress(tokens=after), BatchScheduler(config, 1))
        assert noise is not None and change.noise_scale == noise
        assert change.now <= noise
        assert change.now * shape(config, after) <= 8 * (1 + 1e-9)
        ending = TOKENS - after <= 2 * 16 * change.wanted  # then it is what is left that decides
        assert ending or change.now + 2 > min(noise, 8 / max(shape(config, after), 1e-9), 64)  # and no less than that
        old, new = change.hyperparameters_before, change.hyperparameters_now
        assert new.lr == pytest.approx(old.lr * math.sqrt(change.now / change.before))
        assert change.tau_now == pytest.approx(change.tau_before)
    if feed == "unknown" or schedule == "constant":
        assert set(sizes) == {8}
    if feed == "plenty" and schedule != "constant":
        assert max(sizes) == 64 if schedule != "cosine" else 60 < max(sizes) <= 64


def test_the_drift_of_a_step_never_exceeds_its_peak() -> None:
    """lr sqrt(batch) of the steps that are taken, where only stability binds: constant from the peak to the cap."""
    plan, progress, drifts = BatchScheduler(measured(), 1), Progress(), []
    while step := plan.step(progress):
        drifts.append(step.lr * math.sqrt(step.global_batch))
        progress = progress.after(step)
        plan.update(progress, 1e6)
    peak = plan.config.optimizer.lr * math.sqrt(8)
    assert max(drifts) <= peak
    # a constant batch, whose drift falls with the rate, is above three quarters for 30 % of its steps
    assert sum(drift > 0.75 * peak for drift in drifts) > 0.75 * len(drifts)


def test_fewer_steps_are_taken_as_the_theory_says() -> None:
    """The mean of 1 / kappa over the tokens of decay to zero after 10 % of warm-up, at most 8 times the batch: the
    smaller the units the batch grows by, the nearer."""
    shares = []
    for batch, unit in ((8, 4), (8, 2), (8, 1), (64, 1)):
        values = {**MEASURED, "batch__largest": 8 * batch}
        constant = len(run(BatchScheduler(config(batch, unit, tokens=TOKENS * batch // 8), 1)))
        plan = BatchScheduler(config(batch, unit, tokens=TOKENS * batch // 8, **values), 1)
        shares.append(len(run(plan, FEEDS["plenty"])) / constant)
    assert shares == sorted(shares, reverse=True) and shares[0] < 0.64
    assert shares[-1] == pytest.approx(0.1 + 0.9 / 2 * (1 - 1 / 8**2) + 0.9 / 8**2, abs=0.004)


def phases(changes: Sequence[Change]) -> list[str]:
    return [change.reason.split(": ")[1].split(" allows")[0] for change in changes]


def test_a_change_says_which_bound_held_it() -> None:
    changes = [change for _, _, change in run(BatchScheduler(measured(), 1), FEEDS["plenty"]) if change]
    assert set(phases(changes)) == {"stability"}
    low = run(BatchScheduler(measured(batch__noise_share=0.1), 1), list(np.linspace(100, 200, 1000)))
    assert phases([change for _, _, change in low if change])[-1] == "noise"


def test_nothing_grows_before_the_peak_or_while_the_noise_scale_is_unknown() -> None:
    first = next(before for before, _, change in run(BatchScheduler(measured(), 1), FEEDS["plenty"]) if change)
    assert first.tokens >= 0.1 * TOKENS
    late: list[float | None] = [None] * 700 + [1e6] * 300
    assert (
        next(before for before, _, change in run(BatchScheduler(measured(), 1), late) if change).tokens >= 0.69 * TOKENS
    )


def test_little_is_left_untrained() -> None:
    """At the end 1 / shape runs away; the batch divides what is left of the run as far as it can, since it never
    shrinks: without that most of a batch is lost, over these horizons in the mean."""
    lost = []
    for tokens in range(TOKENS, TOKENS + 640, 64):
        plan = BatchScheduler(measured(batch__largest=0, tokens=tokens), 1)
        *_, last = run(plan, FEEDS["plenty"])
        before, size, _ = last
        lost.append((tokens - (before.tokens + size * 16)) / (size * 16))
        assert plan.batch == size  # and none that is not taken
    assert max(lost) < 1 and np.mean(lost) < 0.2


@pytest.mark.parametrize("kappa", [1, 2, 8])
def test_a_batch_that_has_grown_warms_up_again_below_the_same_drift(kappa: int) -> None:
    """A branch, or a run with another horizon, that continues with a grown batch: the rate is limited instead."""
    values = {"schedule__start": TOKENS, "schedule__warmup": 0.05, "train__tokens": 2 * TOKENS}
    plan = BatchScheduler(measured(**values), 1)
    progress = Progress(500, TOKENS // 16, TOKENS)
    plan.load_state({**plan.state(), "batch": 8 * kappa}, progress)
    drifts = []
    while step := plan.step(progress):
        drifts.append(step.lr * math.sqrt(step.global_batch))
        progress = progress.after(step)
        plan.update(progress, 1e6)
    peak = plan.config.optimizer.lr * math.sqrt(8)
    assert max(drifts) <= peak * (1 + 1e-12) and max(drifts) > 0.98 * peak


def test_bounds_are_tokens_whatever_the_length() -> None:
    """Sequences four times as long: noise scales are a quarter in number, and the batch in tokens keeps its course."""
    short, long = measured(), measured(data__lengths=(f"{TOKENS // 2 // 64 * 64}:64",))
    feed = [1000.0] * 500 + [250.0] * 500
    same = [before.tokens + size * 16 for before, size, _ in run(BatchScheduler(short, 1), [1000.0])]
    found, plan = Progress(), BatchScheduler(long, 1)
    ends = []
    while step := plan.step(found):
        found = found.after(step)
        ends.append(found.tokens)
        plan.update(found, at(feed, found, plan))
    assert len(same) <= len(ends) < 1.08 * len(same)  # a unit is four times as large in the second half
    assert plan.tokens > 6 * 8 * 16
