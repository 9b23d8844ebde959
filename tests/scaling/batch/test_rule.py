"""What follows a larger batch."""

from __future__ import annotations

import math

import pytest
from scaling.batch.schedulers import config, run

from megahp.config import Config, with_values
from megahp.scaling.batch import BatchScheduler, follow


@pytest.mark.parametrize(
    ("rule", "kappa", "expected"),
    [  # lr, weight decay, beta1, beta2, eps over the base values 0.01, 0.1, 1, 1, 1e-8
        ("power-lines", 4, (1, 4, 0.9, 0.95, 1)),
        ("sqrt", 2, (2**0.5, 2**0.5, 0.9, 0.9025, 0.5**0.5)),
        ("sqrt", 4, (2, 2, 0.9, 0.9, 0.5)),
        ("sde", 2, (2**0.5, 2**0.5, 0.81, 0.9025, 0.5**0.5)),
        ("sde", 4, (2, 2, 0.6561, 0.9, 0.5)),
        ("none", 4, (1, 1, 0.9, 0.95, 1)),
    ],
)
def test_rules(rule: str, kappa: float, expected: tuple[float, ...]) -> None:
    """The table of docs/batch.md; check 35: a doubled batch multiplies the rate by sqrt 2 under sqrt."""
    base = with_values(Config(), {"optimizer.lr": 0.01}).optimizer
    values = follow(rule, base, kappa)
    found = (values.lr / 0.01, values.weight_decay / 0.1, values.beta1, values.beta2, values.eps / 1e-8)
    assert found == pytest.approx(expected, rel=1e-12)


def test_under_sde_moments_average_over_as_many_tokens() -> None:
    """check 35b: to first order 1 - kappa (1 - beta) (Malladi et al., arXiv 2205.10287, definition 4.1)."""
    base = with_values(Config(), {"optimizer.beta1": 0.999, "optimizer.beta2": 0.9999}).optimizer
    for kappa in (0.5, 2, 4, 8):
        values = follow("sde", base, kappa)
        for beta, before in ((values.beta1, base.beta1), (values.beta2, base.beta2)):
            assert math.log(beta) / math.log(before) == pytest.approx(kappa)
            assert 1 - beta == pytest.approx(kappa * (1 - before), rel=0.005)


def test_tau_stays_under_power_lines_and_is_told() -> None:
    changes = [
        change for _, _, change in run(BatchScheduler(config(4, batch__policy="table", batch__table=("640:8",)), 1))
    ]
    (change,) = [change for change in changes if change]
    assert change.tau_before == pytest.approx(change.tau_now) == pytest.approx(4 * 16 / (4e-3 * 0.1 * 3840))
    plain = follow("none", Config().optimizer, 2)
    assert plain.timescale(8 * 16, 3840) == pytest.approx(2 * change.tau_before)
