"""Power Lines' laws at published and hand-computed points (checks 1 to 5)."""

from __future__ import annotations

import pytest

from megahp.scaling.power_laws import (
    CRITICAL_BATCH,
    OPTIMAL_BATCH,
    PAPER_SEQUENCE,
    TAU,
    critical_batch_along,
    least_tokens,
    optimal_weight_decay,
    timescale,
)

ETA = 1.62e-2 * 256 / 2048  # the 610M model's hidden learning rate under muP


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ({"batch": 504}, 0.105),
        ({"batch": 126}, 0.026),
        ({"batch": 252}, 0.053),
        ({"batch": 1008}, 0.210),
        ({"batch": 2016}, 0.421),
        ({"decay": 0.025}, 0.421),
        ({"decay": 0.05}, 0.210),
        ({"decay": 0.2}, 0.053),
        ({"decay": 0.4}, 0.026),
        ({"lr": ETA / 4}, 0.421),
        ({"lr": ETA / 2}, 0.210),
        ({"lr": ETA * 2}, 0.053),
        ({"lr": ETA * 4}, 0.026),
    ],
)
def test_timescale_of_the_610m_runs(factor: dict[str, float], expected: float) -> None:
    """Check 1: the published rows of the 610M sweep at 80 tokens per parameter."""
    values = {"lr": ETA, "decay": 0.1, "batch": 504} | factor
    tau = timescale(values["lr"], values["decay"], values["batch"] * PAPER_SEQUENCE, 48.5e9)
    assert tau == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("tpp", "tau"), [(2, 0.7523), (20, 0.22356), (80, 0.10767), (234, 0.06116), (1280, 0.02498)])
def test_tau_opt(tpp: float, tau: float) -> None:
    """Check 2."""
    assert TAU(tpp) == pytest.approx(tau, abs=1e-4)


def test_optimal_weight_decay() -> None:
    """Check 3: 610M, 12.1B tokens; linear in the batch."""
    decay = {b: optimal_weight_decay(ETA, b * PAPER_SEQUENCE, 12.1e9, 12.1e9 / 20) for b in (63, 504, 1008, 2016)}
    assert decay[504] == pytest.approx(0.18844, abs=1e-4)
    assert decay[1008] == 2 * decay[504] and decay[63] == decay[504] / 8


@pytest.mark.parametrize(("tokens", "sequences"), [(3e9, 130.45), (12.1e9, 222.55), (1e11, 499.71), (1e12, 1207.04)])
def test_optimal_batch(tokens: float, sequences: float) -> None:
    """Check 4."""
    assert OPTIMAL_BATCH(tokens) / PAPER_SEQUENCE == pytest.approx(sequences, rel=1e-3)


@pytest.mark.parametrize(("tokens", "sequences"), [(3e9, 1125.77), (12.1e9, 2144.21), (1e11, 5688.80), (1e12, 16482.4)])
def test_critical_batch(tokens: float, sequences: float) -> None:
    assert CRITICAL_BATCH(tokens) / PAPER_SEQUENCE == pytest.approx(sequences, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "batch", "least"), [(12.1e9, 504, 9.5902e9), (48.5e9, 504, 4.2882e10), (12.1e9, 2016, 5.0162e9)]
)
def test_least_tokens(tokens: float, batch: float, least: float) -> None:
    """Check 4, and check 5: (S / S_min - 1) (D / D_min - 1) = 1 there, and both ratios are 2 at the critical batch."""
    found = least_tokens(tokens, batch * PAPER_SEQUENCE)
    assert found == pytest.approx(least, rel=1e-3)
    critical = CRITICAL_BATCH(found)
    steps, fewest = tokens / (batch * PAPER_SEQUENCE), found / critical
    assert (steps / fewest - 1) * (tokens / found - 1) == pytest.approx(1, abs=1e-9)
    doubled = least_tokens(2 * found, critical)
    assert doubled == pytest.approx(found, rel=1e-9)


def test_the_law_along_a_run_has_the_run_s_critical_batch_as_its_mean() -> None:
    horizon, points = 1e9, 100_000
    mean = sum(critical_batch_along(horizon * (i + 0.5) / points) for i in range(points)) / points
    assert mean == pytest.approx(CRITICAL_BATCH(horizon), rel=1e-4)
    assert critical_batch_along(0) == 0.0
