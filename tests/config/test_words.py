"""Lists of "tokens:value" words."""

from __future__ import annotations

import pytest

from megahp.config import Stage, parse_table, stage_at, stages
from megahp.config.schema import Data


def test_lengths_and_mixtures_make_stages_together() -> None:
    data = Data(sequence_length=256, lengths=("100:512",), weights=(1.0, 0.0), mixtures=("50:0.5,0.5", "100:0,1"))
    expected = [Stage(0, 256, (1.0, 0.0)), Stage(50, 256, (0.5, 0.5)), Stage(100, 512, (0.0, 1.0))]
    assert stages(data) == expected
    assert [stage_at(expected, tokens) for tokens in (0, 49, 50, 99, 100, 10**9)] == [0, 0, 1, 1, 2, 2]


def test_a_table_grows_in_tokens_and_batch() -> None:
    assert parse_table(("1e9:512", "2e9:1e3")) == [(1e9, 512), (2e9, 1000)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("1e9",), "'1e9' is not tokens:batch"),
        (("1e9:1.5",), "'1e9:1.5' is not tokens:batch"),
        (("1e9:64", "1e8:128"), "'1e8:128' must come after 1e"),
        (("1e9:64", "2e9:64"), "'2e9:64' must have a larger batch than 64"),
    ],
)
def test_a_wrong_word_is_named(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_table(words)
