"""The batch plan: every sample once on any layout, growth by each policy, and what follows a larger batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from megahp.config import Config, with_values
from megahp.data.loader import rank_samples
from megahp.scaling import power_laws
from megahp.scaling.batch_size import BatchPlan, Change, Progress, follow, runnable, unit


def settings(global_batch: int, micro_batch: int = 2, tokens: int = 16 * 240, **more: object) -> Config:
    values = {
        "data.sequence_length": 16,
        "batch.global_batch": global_batch,
        "batch.micro_batch": micro_batch,
        "train.tokens": tokens,
    }
    return with_values(Config(), values | {key.replace("__", "."): value for key, value in more.items()})


def run(plan: BatchPlan, noise: Sequence[float | None] = (None,)) -> list[tuple[Progress, int, Change | None]]:
    """(progress before a step, its batch, the change after it) for every step. The noise scales are spread evenly over
    the run's tokens."""
    progress, seen = Progress(), []
    while step := plan.step(progress):
        before, progress = progress, progress.after(step)
        seen.append((before, step.global_batch, plan.look(progress, at(noise, progress, plan))))
    return seen


def at(noise: Sequence[float | None], progress: Progress, plan: BatchPlan) -> float | None:
    return noise[(progress.tokens - 1) * len(noise) // plan.settings.train.tokens]


@pytest.mark.parametrize(
    ("batch", "dp", "micro", "expected"),
    [(32, 2, 4, (32,)), (30, 2, 4, (24, 32)), (3, 2, 4, (8,)), (8, 1, 8, (8,))],
)
def test_runnable_names_the_nearest_batches(batch: int, dp: int, micro: int, expected: tuple[int, ...]) -> None:
    assert runnable(batch, dp * micro) == expected


def test_no_sample_is_repeated_or_skipped_when_batch_and_layout_change() -> None:
    progress, seen = Progress(), []
    for batch, micro, dp, steps in [(8, 2, 1, 3), (16, 4, 2, 2), (24, 1, 4, 2), (12, 3, 2, 3)]:
        for _ in range(steps):
            plan = BatchPlan(settings(batch, micro), dp).step(progress)
            assert plan is not None
            numbers = plan.first_sample, plan.global_batch, plan.micro_batch
            ids = [rank_samples(*numbers, rank, dp) for rank in range(dp)]
            assert {len(part) for parts in ids for part in parts} == {micro}
            assert {len(parts) for parts in ids} == {plan.microbatches(dp)}
            seen.append(np.sort(np.concatenate([part for parts in ids for part in parts])))
            progress = progress.after(plan)
    assert np.array_equal(np.concatenate(seen), np.arange(progress.samples))
    assert progress.tokens == progress.samples * 16


def test_the_run_ends_at_its_tokens_or_at_its_steps() -> None:
    steps = run(BatchPlan(settings(32), 1))
    assert len(steps) == 7  # an eighth batch would exceed 240 samples
    assert BatchPlan(settings(32, train__steps=3), 1).step(Progress(3, 96, 96 * 16)) is None


def test_the_mean_learning_rate_does_not_depend_on_the_batch() -> None:
    means = []
    for batch in (2, 8, 40):
        plan, progress, rates = BatchPlan(settings(batch, schedule__warmup=1 / 3), 1), Progress(), []
        while step := plan.step(progress):
            rates.append(step.lr / plan.settings.optimizer.lr)
            progress = progress.after(step)
        means.append(np.mean(rates))
    assert means == pytest.approx([0.5] * 3)


def test_ramp_is_megatrons() -> None:
    """(16, 16, 300000) -> 1024 as Megatron-LM 0.16's own calculator was seen to run it, to its counts at the end."""
    ramp = {"batch__policy": "ramp", "batch__largest": 1024, "batch__increment": 16, "batch__ramp_samples": 300_000}
    steps = run(BatchPlan(settings(16, 16, tokens=16 * 305_000, **ramp), 1))
    starts = {batch: before.samples for before, batch, _ in reversed(steps)}
    assert [starts[size] for size in (16, 32, 48, 64)] == [0, 4768, 9536, 14288]
    assert (starts[1008], starts[1024]) == (296048, 300080)
    assert next((b.step, b.samples) for b, size, _ in steps if b.samples > 300_080) == (1410, 301_104)


def test_table_is_followed_at_its_tokens() -> None:
    plan = BatchPlan(settings(4, 2, batch__policy="table", batch__table=("640:8", "1e3:13")), 1)
    steps = run(plan)
    assert [(before.tokens, size) for before, size, change in steps[:1]] == [(0, 4)]
    grown = [(before.tokens + size * 16, change.before, change.now) for before, size, change in steps if change]
    assert grown == [(640, 4, 8), (1024, 8, 12)]  # 13 is not runnable; 12 is the largest below


def test_a_linear_ramp_of_accumulation_is_a_table() -> None:
    """check 23: accumulation from 2 to 15 over the run, in ten points, rounded up."""
    tokens = 16 * 15 * 400
    points = np.linspace(0, tokens, 14)[1:]
    table = tuple(f"{at:.0f}:{math.ceil(np.interp(at, [0, tokens], [2, 15]))}" for at in points)
    plan = BatchPlan(settings(2, 1, tokens=tokens, batch__policy="table", batch__table=table), 1)
    steps = run(plan)
    sizes = [size for _, size, _ in steps]
    assert (sizes[0], sizes[-1], sizes) == (2, 14, sorted(sizes))
    change = plan.look(Progress(len(sizes), sum(sizes), tokens), None)
    assert change is not None and change.now == 15


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
    plan = BatchPlan(settings(1920, 8, tokens=159_636 * 3_932_160, **BTLM), 4)
    progress, lengths = Progress(), {2048: 0, 8192: 0}
    while step := plan.step(progress):
        assert (step.global_batch, step.tokens) == (1920 * 2048 // step.length, 3_932_160)
        assert step.micro_batch * step.length == 8 * 2048 and step.microbatches(4) == 60
        lengths[step.length] += step.tokens
        progress, last = progress.after(step), step
    assert [round(tokens / 1e7) for tokens in lengths.values()] == [47079, 15693]
    assert (progress.step, progress.samples) == (159_636, 119_727 * 1920 + 39_909 * 480)
    assert last.lr == pytest.approx(0.0001014, abs=5e-8)


def test_a_batch_is_one_that_every_length_can_run() -> None:
    """With microbatches of one sequence, four times the length needs four times the tokens."""
    chosen = settings(8, 1, data__lengths=("640:64",))
    assert (unit(chosen, 2), unit(settings(8, 4, data__lengths=("640:64",)), 2), unit(settings(8, 1), 2)) == (8, 8, 2)
    plan = BatchPlan(chosen, 2)
    sizes = [(before.tokens, size) for before, size, _ in run(plan)]
    assert sizes[:6] == [(128 * k, 8 if k < 5 else 2) for k in range(6)]
    short = BatchPlan(settings(2, 1, tokens=16 * 8, data__sequence_length=16, data__lengths=("32:4",)), 1)
    assert [size for _, size, _ in run(short)] == [2, 8, 8, 8]


def test_the_closed_loop_starts_again_with_another_length() -> None:
    """Examples of 64 tokens need a quarter of the noise scale for the same growth, and a half-life of their own."""
    long = settings(16, 4, tokens=16 * 16 * 1000, **{**NOISE, "batch__largest": 0, "data__lengths": ("128e3:64",)})
    feed = [30.0] * 495 + [100.0] * 5 + [8.0 * 1.2] * 250 + [8.0 * 2.1] * 250
    steps = run(BatchPlan(long, 1), feed)
    (change,) = [(before, change) for before, _, change in steps if change]
    assert change[0].tokens >= 0.77 * 256e3 and (change[1].before, change[1].now) == (4, 8)
    assert change[1].noise_scale == 8.0 * 2.1 and change[1].wanted == pytest.approx(8.0)  # growth is twice at most
    assert {size for before, size, _ in steps if before.tokens < 128e3} == {16}


def test_law_spreads_the_critical_batch_along_the_run() -> None:
    values = {"batch__policy": "law", "batch__target": 0.5, "data__sequence_length": 2048}
    plan = BatchPlan(settings(8, 1, tokens=2048 * 200_000, **values), 1)
    steps = run(plan)
    expected = max(8, int(0.5 * 1.462 * 0.0471 * steps[-1][0].tokens ** 0.462))
    assert abs(steps[-1][1] - expected) <= 1
    sizes = [size for _, size, _ in steps]
    assert sizes == sorted(sizes) and sizes[-1] > 20 * sizes[0]


def test_the_law_is_the_papers_unless_the_run_has_its_own() -> None:
    paper = power_laws.CRITICAL_BATCH
    assert Config().batch.critical_batch == pytest.approx((paper.scale, paper.exponent), rel=1e-12)
    values = {"batch__policy": "law", "batch__target": 0.5, "batch__critical_batch": (3.0, 0.5)}
    asked = BatchPlan(settings(8, **values), 1).aim(Progress(tokens=400), None)
    assert asked == pytest.approx(0.5 * 1.5 * 3 * 400**0.5 / 16)


@pytest.mark.parametrize(
    ("rule", "kappa", "expected"),
    [  # lr, weight decay, beta2, eps over the base values 0.01, 0.1, 0.95, 1e-8
        ("power-lines", 4, (1, 4, 0.95, 1)),
        ("sqrt", 2, (2**0.5, 2**0.5, 0.9025, 0.5**0.5)),
        ("sqrt", 4, (2, 2, 0.9, 0.5)),
        ("none", 4, (1, 1, 0.95, 1)),
    ],
)
def test_rules(rule: str, kappa: float, expected: tuple[float, ...]) -> None:
    """The table of docs/batch.md; check 35: a doubled batch multiplies the rate by sqrt 2 under sqrt."""
    base = with_values(Config(), {"optimizer.lr": 0.01}).optimizer
    values = follow(rule, base, kappa)
    found = (values.lr / 0.01, values.weight_decay / 0.1, values.beta2, values.eps / 1e-8)
    assert found == pytest.approx(expected, rel=1e-12)
    assert values.beta1 == base.beta1


def test_tau_stays_under_power_lines_and_is_told() -> None:
    changes = [
        change for _, _, change in run(BatchPlan(settings(4, batch__policy="table", batch__table=("640:8",)), 1))
    ]
    (change,) = [change for change in changes if change]
    assert change.tau_before == pytest.approx(change.tau_now) == pytest.approx(4 * 16 / (4e-3 * 0.1 * 3840))
    plain = follow("none", Config().optimizer, 2)
    assert plain.timescale(8 * 16, 3840) == pytest.approx(2 * change.tau_before)


def test_sqrt_waits_until_beta2_may_change() -> None:
    table = {"batch__policy": "table", "batch__table": ("16:4",), "batch__rule": "sqrt"}
    steps = run(BatchPlan(settings(2, 2, tokens=16 * 1000, **table), 1))
    assert [before.step + 1 for before, _, change in steps if change] == [200]  # 10 / (1 - 0.95)


NOISE = {
    "batch__policy": "noise-scale",
    "batch__target": 0.5,
    "batch__noise_to_total": 1.0,
    "batch__look_every": 1,
    "batch__delay": 0.05,
    "batch__largest": 64,
    "train__noise_half_life": 0.02,
}
TOKENS = 16 * 4 * 1000  # 1,000 steps of the first batch; a half-life is 20 of them


def noise_run(feed: Sequence[float | None]) -> list[tuple[Progress, int, Change | None]]:
    return run(BatchPlan(settings(4, 2, tokens=TOKENS, **NOISE), 1), feed)


def feeds() -> dict[str, list[float | None]]:
    random = np.random.RandomState(0)
    walk = np.exp(np.cumsum(random.normal(0.003, 0.1, 1000)))
    broken = [value if random.rand() < 0.5 else random.choice([math.nan, math.inf, -math.inf]) for value in 9 * walk]
    return {
        "steps": [8.0] * 300 + [40.0] * 300 + [500.0] * 400,
        "drift": list(np.linspace(4, 300, 1000)),
        "walk": list(8 * walk),
        "spikes": [1e6 if random.rand() < 0.3 else 7.0 for _ in range(1000)],
        "broken": broken,
        "unknown": [None] * 1000,
        "missing": [value if random.rand() < 0.7 else None for value in 20 * walk],
    }


@pytest.mark.parametrize("name", feeds())
def test_the_closed_loop_keeps_its_promises(name: str) -> None:
    """Whatever it is fed: never shrinks, never above cap or growth limit, never early, always runnable."""
    steps = noise_run(feeds()[name])
    sizes = [size for _, size, _ in steps]
    assert sizes == sorted(sizes) and max(sizes) <= 64 and all(size % 2 == 0 for size in sizes)
    changes = [(before, change) for before, _, change in steps if change]
    assert all(c.before < c.now <= 2 * c.before and c.wanted >= 1.25 * c.before for _, c in changes)
    assert all(before.tokens >= 0.05 * TOKENS for before, _ in changes)
    times = [before.tokens for before, _ in changes]
    assert all(later - earlier >= 0.02 * TOKENS for earlier, later in itertools.pairwise(times))
    assert all(change.noise_scale * 0.5 >= change.now for _, change in changes)
    if name in ("steps", "drift"):
        assert max(sizes) == 64
    if name in ("spikes", "unknown"):
        assert changes == []


@pytest.mark.parametrize("length", range(1, 21))
def test_a_spike_shorter_than_the_half_life_grows_nothing(length: int) -> None:
    feed = [7.0] * 200 + [1e9] * length + [7.0] * 800
    assert max(size for _, size, _ in noise_run(feed)) == 4


def test_a_step_longer_than_the_half_life_grows() -> None:
    assert max(size for _, size, _ in noise_run([7.0] * 200 + [1e9] * 22 + [7.0] * 800)) == 8


def test_state_goes_on_where_it_stopped() -> None:
    """A plan rebuilt from its state after every step decides as one that was never interrupted."""
    feed = feeds()["walk"]
    whole = [(size, change) for _, size, change in noise_run(feed)]
    progress, seen, state = Progress(), [], None
    while True:
        plan = BatchPlan(settings(4, 2, tokens=TOKENS, **NOISE), 1)
        if state:
            assert plan.go_on(state, progress) == []
        step = plan.step(progress)
        if step is None:
            break
        progress = progress.after(step)
        seen.append((step.global_batch, plan.look(progress, at(feed, progress, plan))))
        state = plan.state()
    assert seen == whole and any(change for _, change in seen)


SAVED = {"batch": 12, "length": 16, "since": None, "least": None, "began": 0}


@pytest.mark.parametrize(("largest", "expected"), [(64, 16), (15, 8), (16, 16)])
def test_a_state_moves_to_a_layout_that_cannot_run_its_batch(largest: int, expected: int) -> None:
    """Up, or where that would exceed the limit down; and it is told."""
    plan = BatchPlan(settings(8, 4, tokens=TOKENS, **{**NOISE, "batch__largest": largest}), 2)
    (change,) = plan.go_on(SAVED, Progress(50, 400, 6400))
    assert (change.before, change.now, plan.batch) == (12, expected, expected)
    assert "layout" in change.reason and change.hyperparameters_now == plan.hyperparameters(expected)
    assert BatchPlan(settings(8, 4, tokens=TOKENS), 2).go_on({**SAVED, "batch": 8}, Progress()) == []


def test_a_policy_that_is_behind_catches_up_at_once() -> None:
    plan = BatchPlan(settings(4, 2, batch__policy="table", batch__table=("320:8", "640:12")), 1)
    (change,) = plan.go_on({**SAVED, "batch": 4}, Progress(10, 40, 640))
    assert (change.before, change.now) == (4, 12)


def test_a_ramp_begins_where_its_plan_does() -> None:
    ramp = {"batch__policy": "ramp", "batch__largest": 8, "batch__increment": 2, "batch__ramp_samples": 40}
    whole = [size for _, size, _ in run(BatchPlan(settings(4, 2, tokens=16 * 240, **ramp), 1))]
    late, progress, sizes = BatchPlan(settings(4, 2, tokens=16 * 1240, **ramp), 1), Progress(99, 1000, 16_000), []
    assert late.go_on({**SAVED, "batch": 4, "began": 16_000}, progress) == []
    while step := late.step(progress):
        progress = progress.after(step)
        sizes.append(step.global_batch)
        late.look(progress, None)
    assert sizes == whole and set(sizes) == {4, 6, 8}


def test_an_unknown_noise_scale_confirms_nothing() -> None:
    """Two looks at a spike, a half-life apart, with nothing known between them."""
    feed = [3.0] * 200 + [1e3] + [None] * 22 + [1e3] + [3.0] * 776
    assert max(size for _, size, _ in noise_run(feed)) == 4
