"""Windows as tokens, against a coding by loops in float64; and files of codings that others may have written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megahp.errors import UserError
from megahp.series.binning import Binning
from megahp.series.coding import SeriesCoding, load_coding

BINNING = Binning((3, 4), -0.5, 1.5, (2.0, 4.0))
CODINGS = {
    "plain": SeriesCoding(BINNING, 7, 6),
    "backfill": SeriesCoding(BINNING, 7, 6, 3, "backfill"),
    "alternating": SeriesCoding(BINNING, 7, 6, 2, "backfill-alternating"),
    "flat": SeriesCoding(Binning((12,), -0.5, 1.5, (2.0, 4.0)), 7, 6),
}


def by_loops(coding: SeriesCoding, values: np.ndarray) -> list[int]:
    """The tokens of one window, of levels of 3 and 4 bins or of 12."""
    given = [y for y in values[: coding.conditioning] if not math.isnan(y)]
    low, span = min(given), max(given) - min(given)
    tokens = [13 if coding.levels == (12,) else 8]
    for time in coding.times:
        z = (values[time] - low) / span
        index = min(max(math.floor((z + 0.5) / (2 / 12)), 0), 11) if not math.isnan(z) else None
        if coding.levels == (12,):
            tokens += [12 if index is None else index]
        else:
            tokens += [7, 7] if index is None else [index // 4, 3 + index % 4]
    return tokens


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_tokens(coding: SeriesCoding) -> None:
    random = np.random.default_rng(1)
    values = random.normal(5, 3, (4, 5, coding.window))
    values[random.uniform(size=values.shape) < 0.2] = np.nan
    tokens, scale = coding.encode(values)
    assert tokens.shape == (4, 5, coding.window_tokens) and tokens.max() < coding.vocab_size
    assert all(tokens[n].tolist() == by_loops(coding, values[n]) for n in np.ndindex(4, 5))
    prompt, alone = coding.prompt(values[..., : coding.conditioning])
    assert (prompt == tokens[..., : coding.prompt_tokens]).all() and prompt.shape[-1] == coding.prompt_tokens
    assert (alone.span == scale.span).all()
    # back to time and unit: known values within half an interval, where that is none of the tails
    forecast = values[..., coding.conditioning :]
    known = np.where(np.isnan(forecast), scale.minimum[..., None], forecast)
    tokens = coding.encode(np.concatenate((values[..., : coding.conditioning], known), -1))[0]
    back = scale.undo(coding.forecast(tokens[..., coding.prompt_tokens :]))
    inside = np.abs(scale.apply(known) - 0.5) < 0.83
    assert inside.mean() > 0.5
    assert (np.abs(back - known) <= scale.span[..., None] / 12 + 1e-9)[inside].all()
    for place in range(coding.horizon_tokens):
        level = place % len(coding.levels)
        ids = coding.ids_at(place)
        assert len(ids) == coding.levels[level] and ids.start == sum(coding.levels[:level])
        assert set(np.unique(tokens[..., coding.prompt_tokens + place])) <= set(ids)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_likelihood(coding: SeriesCoding) -> None:
    """Of each value in its own unit, with made-up losses: by scipy's distributions, value by value."""
    random = np.random.default_rng(2)
    values = random.normal(5, 3, coding.window)
    tokens, scale = coding.encode(values)
    losses = random.exponential(size=coding.horizon_tokens)
    forecast = values[coding.conditioning :]
    found = coding.nats(losses, forecast, scale)
    places = list(coding.times[coding.conditioning :] - coding.conditioning)
    levels = len(coding.levels)
    low, span = values[: coding.conditioning].min(), np.ptp(values[: coding.conditioning])
    for time, y in enumerate(forecast):
        place = places.index(time)
        z, inner = (y - low) / span, (-0.5 + 2 / 12, 1.5 - 2 / 12)
        if z < inner[0]:
            density = stats.pareto(2.0, scale=-inner[0]).pdf(-z)
        elif z >= inner[1]:
            density = stats.pareto(4.0, scale=inner[1]).pdf(z)
        else:
            density = 6.0
        expected = losses[place * levels : (place + 1) * levels].sum() - math.log(density / span)
        assert found[time] == pytest.approx(expected, rel=1e-12)
    assert len(tokens) == coding.window_tokens


def test_short_histories_and_scales() -> None:
    coding = CODINGS["plain"]
    tokens, scale = coding.prompt(np.array([3.0, 5.0]))
    assert tokens.tolist()[1:-4] == [coding.missing] * 10 and (scale.minimum, scale.span) == (3, 2)
    given = np.array([[1.0, 1.0, np.nan], [np.nan, np.nan, np.nan], [1.0, 2.0, np.nan]])
    assert np.array_equal(coding.scale(given).span, [0, np.nan, 1], equal_nan=True)


@pytest.mark.parametrize("given", [7, 5])
@pytest.mark.parametrize(("length", "stride"), [(13, 1), (20, 3), (40, 13), (12, 5), (11, 1)])
def test_windows(given: int, length: int, stride: int) -> None:
    """Every window is one of the series with 7 - 6 missing values before it; shorter than two horizons, it has none."""
    coding = replace(CODINGS["plain"], conditioning=given)
    found = [window.tolist() for window in coding.windows(np.arange(length), stride)]
    ends = list(range(length - 1, given + 4 if given < 6 else 10, -stride))[::-1]
    wanted = [[time if time >= 0 else None for time in range(end - given - 5, end + 1)] for end in ends]
    assert [[None if math.isnan(y) else y for y in window] for window in found] == wanted


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.series"
    for coding in CODINGS.values():
        coding.save(path)
        assert load_coding(path) == coding and load_coding(path).fingerprint == coding.fingerprint
    assert len({coding.fingerprint for coding in CODINGS.values()}) == len(CODINGS)


WRONG: dict[str, Any] = {
    "binning": [3, {}],
    "conditioning": [1, "7", 2.0, True, 10**9],
    "horizon": [0, -6, None],
    "sub_series": [0, 4, -3],
    "order": ["sideways", 3, ["regular"]],
    "levels": [[], [1, 3], [3.0], 12, ["3"], [10000, 10000], [True, True]],
    "low": [1.5, math.nan, "0", 10**400],
    "tails": [[1.0], [1.0, 0.0], [1.0, math.inf], 3.0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "a.series"
    CODINGS["backfill"].save(path)
    content = json.loads(path.read_text())
    (content["binning"] if name in content["binning"] else content)[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.series") as error:
        load_coding(path)
    assert "\n" not in str(error.value)


def test_k_must_divide_the_horizon() -> None:
    with pytest.raises(UserError, match="4 sub-series do not divide a horizon of 6"):
        replace(CODINGS["plain"], sub_series=4)
