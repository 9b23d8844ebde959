"""What stands out among losses and gradient norms, against a plain computation with numpy."""

from __future__ import annotations

import math

import numpy as np

from megahp.config.schema import ResilienceConfig
from megahp.faults.spikes import Spikes

SETTINGS = ResilienceConfig(spike_window=32, spike_sigmas=6.0)


def losses(steps: int, seed: int = 1) -> np.ndarray:
    """A loss that falls as a power law, with noise of 0.02."""
    return 3 + 5 * np.arange(1, steps + 1) ** -0.3 + 0.02 * np.random.RandomState(seed).standard_normal(steps)


def test_nothing_stands_out_of_ten_thousand_normal_steps() -> None:
    spikes = Spikes(ResilienceConfig())
    norms = np.exp(0.1 * np.random.RandomState(2).standard_normal(10_000))
    told = [spikes.update(loss, norm) for loss, norm in zip(losses(10_000).tolist(), norms.tolist(), strict=True)]
    assert sum(map(bool, told)) <= 1


def test_the_limit_is_so_many_deviations_above_the_mean() -> None:
    before = losses(100)[-32:]
    limit = before.mean() + 6 * before.std()
    for loss, stands_out in ((limit + 1e-9, True), (limit - 1e-9, False), (before.mean() - 100, False)):
        spikes = Spikes(SETTINGS)
        assert not any(spikes.update(each, 1.0) for each in before.tolist())
        assert bool(spikes.update(loss, 1.0)) == stands_out


def test_both_are_named() -> None:
    spikes = Spikes(SETTINGS)
    for number in range(32):
        spikes.update(3 + 0.1 * (number % 2), 1 + 0.1 * (number % 3))
    assert spikes.update(100.0, 1.0).startswith("loss 100 is above 3.35")
    assert "gradient norm 50" in spikes.update(3.0, 50.0)


def test_a_window_that_is_not_full_tells_nothing() -> None:
    spikes = Spikes(SETTINGS)
    assert [spikes.update(loss, 1.0) for loss in [*[3.0] * 30, 1e9]] == [""] * 31


def test_one_spike_does_not_hide_the_next_and_a_new_level_becomes_normal() -> None:
    spikes = Spikes(SETTINGS)
    for loss in losses(64).tolist():
        spikes.update(loss, 1.0)
    assert [bool(spikes.update(loss, 1.0)) for loss in (50.0, 5.0, 50.0)] == [True, False, True]
    told = [bool(spikes.update(8.0, 1.0)) for _ in range(64)]
    assert told[0] and not any(told[-16:])


def test_what_is_saved_goes_on_as_if_it_had_not_been() -> None:
    one, other = Spikes(SETTINGS), Spikes(SETTINGS)
    for loss in losses(40).tolist():
        one.update(loss, 1.0)
    other.load_state(one.state())
    more = [*losses(60, seed=3).tolist(), math.pi * 1000]
    assert [one.update(loss, 2.0) for loss in more] == [other.update(loss, 2.0) for loss in more]
    assert one.state() == other.state()
