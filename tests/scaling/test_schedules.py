"""Schedules over tokens, and AdamW read as an average."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megahp.config import ScheduleConfig
from megahp.scaling.schedules import dual_coefficients, fraction


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0.0), (50, 0.5), (100, 1.0), (550, 0.5), (990, 0.011111), (1000, 0.0)]
)
def test_decay_to_zero_at_known_points(tokens: int, expected: float) -> None:
    """check 16."""
    assert fraction(ScheduleConfig("decay-to-zero", warmup=0.1), tokens, 1000) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["decay-to-zero", "cosine", "wsd"])
def test_stays_at_its_end_beyond_the_horizon(name: str) -> None:
    schedule = ScheduleConfig(name, floor=0.0 if name == "decay-to-zero" else 0.1)
    assert fraction(schedule, 2000, 1000) == fraction(schedule, 1000, 1000) == pytest.approx(schedule.floor)


def test_linear_falls_to_its_floor() -> None:
    schedule = ScheduleConfig("linear", warmup=0.1, floor=0.2)
    assert [fraction(schedule, t, 1000) for t in (50, 100, 550, 1000)] == pytest.approx([0.5, 1.0, 0.6, 0.2])


@pytest.mark.parametrize("name", ["decay-to-zero", "linear", "cosine", "wsd", "constant", "inverse-sqrt"])
def test_one_that_starts_later_is_over_the_rest(name: str) -> None:
    whole, late = ScheduleConfig(name, warmup=0.2), ScheduleConfig(name, start=600, warmup=0.2)
    for tokens in (0, 40, 80, 200, 390, 400):
        assert fraction(late, 600 + tokens, 1000) == pytest.approx(fraction(whole, tokens, 400))


def test_constant_stays_at_the_peak() -> None:
    schedule = ScheduleConfig("constant", warmup=0.1)
    assert [fraction(schedule, tokens, 1000) for tokens in (50, 100, 999)] == [0.5, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak() -> None:
    assert fraction(ScheduleConfig(warmup=0.0), 0, 1000) == 1.0


def test_cosine_at_known_points() -> None:
    schedule = ScheduleConfig("cosine", warmup=0.1, floor=0.1)
    assert [fraction(schedule, t, 1000) for t in (50, 100, 550, 1000)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("shape", "half"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", 2 * 0.5**0.5 - 1), ("minus-sqrt", 1 - 0.5**0.5)],
)
def test_wsd_at_its_boundaries(shape: str, half: float) -> None:
    """check 33: warm-up, stable, decay; every shape is 1 where the decay begins and 0 where it ends."""
    schedule = ScheduleConfig("wsd", warmup=0.1, decay=0.2, shape=shape)
    found = [fraction(schedule, tokens, 1000) for tokens in (0, 50, 100, 500, 800, 900, 1000)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, half, 0.0])
    with_floor = ScheduleConfig("wsd", warmup=0.1, decay=0.2, shape=shape, floor=0.2)
    assert fraction(with_floor, 900, 1000) == pytest.approx(0.2 + 0.8 * half)


def test_inverse_sqrt_goes_on_from_the_peak() -> None:
    schedule = ScheduleConfig("inverse-sqrt", warmup=0.1)
    assert [fraction(schedule, t, 1000) for t in (100, 400, 900)] == pytest.approx([1.0, 0.5, 1 / 3])


@pytest.mark.parametrize(
    ("name", "last", "largest", "at"), [("constant", 0.01, 0.01, 1000), ("decay-to-zero", 1.1e-5, 0.002024, 700)]
)
def test_duals_add_up_to_one(name: str, last: float, largest: float, at: int) -> None:
    """check 16 and the vectors of its section 4: T = 1000, warm-up 100, eta lambda = 0.01 at the peak."""
    warmup = 0.0 if name == "constant" else 0.1
    lr = np.array([fraction(ScheduleConfig(name, warmup=warmup), t, 1000) for t in range(1, 1001)])
    first, coefficients = dual_coefficients(lr, np.full(1000, 0.01))
    assert first + coefficients.sum() == pytest.approx(1.0, abs=1e-12)
    assert coefficients[998 if name == "decay-to-zero" else 999] == pytest.approx(last, rel=0.02)
    assert coefficients.max() == pytest.approx(largest, rel=1e-3)
    assert abs(int(coefficients.argmax()) + 1 - at) <= 1


def test_adamw_is_its_average() -> None:
    """check 17: a loop of AdamW on a quadratic equals the expansion, weight decay and rate varying."""
    steps, beta1, beta2, eps = 60, 0.9, 0.95, 1e-8
    generator = torch.Generator().manual_seed(0)
    target, start = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    lr = np.array([0.05 * fraction(ScheduleConfig(warmup=0.2), t + 0.5, steps) for t in range(steps)])
    decay = np.linspace(0.1, 0.4, steps)
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], betas=(beta1, beta2), eps=eps)
    updates = []
    for t in range(steps):
        optimizer.param_groups[0].update(lr=lr[t], weight_decay=decay[t])
        weight.grad = weight.detach() - target
        optimizer.step()
        state = optimizer.state[weight]
        m, v = state["exp_avg"] / (1 - beta1 ** (t + 1)), state["exp_avg_sq"] / (1 - beta2 ** (t + 1))
        updates.append(-m / (v.sqrt() + eps) / decay[t])
    first, coefficients = dual_coefficients(lr, decay)
    expanded = first * start + sum(c * x for c, x in zip(coefficients, updates, strict=True))
    torch.testing.assert_close(weight.detach(), expanded, rtol=1e-10, atol=1e-10)
