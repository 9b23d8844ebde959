"""The forecast of the noise scale: by the law, and at what is measured."""

from __future__ import annotations

import pytest
from scaling.batch.schedulers import config

from megahp.scaling.batch import Progress, noise_forecast

LAW = {"batch__critical_batch": (300.0, 0.5)}


def test_the_forecast_begins_at_what_is_measured() -> None:
    run = config(4, batch__policy="measured", **LAW)
    assert noise_forecast(config(4, batch__policy="law", **LAW), Progress(), None)(100) is None
    by_law, measured = noise_forecast(run, Progress(), None), noise_forecast(run, Progress(10, 40, 640), 70.0)
    assert by_law(640) == pytest.approx(300 * 1.5 * 640**0.5 / 16)
    assert measured(640) == pytest.approx(70) and measured(4 * 640) == pytest.approx(2 * 70)


def test_the_forecast_counts_sequences_of_the_length_at_that_moment() -> None:
    """As the plan looks at it: the batch it allows in tokens is the law's, whatever the length."""
    plain = noise_forecast(config(4, batch__policy="measured", **LAW), Progress(), None)
    longer = config(4, batch__policy="measured", data__lengths=("960:64",), **LAW)
    found = noise_forecast(longer, Progress(), None)
    assert found(640) == plain(640) and found(1920) == pytest.approx(plain(1920) / 4)
