"""The closed loop: a batch that follows the measured noise scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scaling.batch.schedulers import NOISE, TOKENS, at, config, run

from megahp.scaling.batch import BatchScheduler, Change, Progress


def noise_run(feed: Sequence[float | None]) -> list[tuple[Progress, int, Change | None]]:
    return run(BatchScheduler(config(4, 2, tokens=TOKENS, **NOISE), 1), feed)


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


def test_an_unknown_noise_scale_confirms_nothing() -> None:
    """Two decisions at a spike, a half-life apart, with unknown values between them."""
    feed = [3.0] * 200 + [1e3] + [None] * 22 + [1e3] + [3.0] * 776
    assert max(size for _, size, _ in noise_run(feed)) == 4


def test_the_closed_loop_starts_again_with_another_length() -> None:
    """Examples of 64 tokens need a quarter of the noise scale for the same growth, and a half-life of their own."""
    long = config(16, 4, tokens=16 * 16 * 1000, **{**NOISE, "batch__largest": 0, "data__lengths": ("128e3:64",)})
    feed = [30.0] * 495 + [100.0] * 5 + [8.0 * 1.2] * 250 + [8.0 * 2.1] * 250
    steps = run(BatchScheduler(long, 1), feed)
    (change,) = [(before, change) for before, _, change in steps if change]
    assert change[0].tokens >= 0.77 * 256e3 and (change[1].before, change[1].now) == (4, 8)
    assert change[1].noise_scale == 8.0 * 2.1 and change[1].wanted == pytest.approx(8.0)  # growth is twice at most
    assert {size for before, size, _ in steps if before.tokens < 128e3} == {16}


def test_state_goes_on_where_it_stopped() -> None:
    """A plan rebuilt from its state after every step decides as one that was never interrupted."""
    feed = feeds()["walk"]
    whole = [(size, change) for _, size, change in noise_run(feed)]
    progress, seen, state = Progress(), [], None
    while True:
        plan = BatchScheduler(config(4, 2, tokens=TOKENS, **NOISE), 1)
        if state:
            assert plan.load_state(state, progress) == []
        step = plan.step(progress)
        if step is None:
            break
        progress = progress.after(step)
        seen.append((step.global_batch, plan.update(progress, at(feed, progress, plan))))
        state = plan.state()
    assert seen == whole and any(change for _, change in seen)
