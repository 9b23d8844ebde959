"""Lists of "tokens:value" words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megahp.config import Phase, parse_skip, parse_table, phase_at, phases_of
from megahp.config.schema import DataConfig


def test_lengths_and_mixtures_make_phases_together() -> None:
    data = DataConfig(sequence_length=256, lengths=("100:512",), weights=(1.0, 0.0), mixtures=("50:0.5,0.5", "100:0,1"))
    expected = [Phase(0, 256, (1.0, 0.0)), Phase(50, 256, (0.5, 0.5)), Phase(100, 512, (0.0, 1.0))]
    assert phases_of(data) == expected
    assert [phase_at(expected, tokens) for tokens in (0, 49, 50, 99, 100, 10**9)] == [0, 0, 1, 1, 2, 2]


class Asked(float):
    """Tokens that count how often they are compared."""

    times = 0

    def __gt__(self, other: float) -> bool:
        Asked.times += 1
        return float.__gt__(self, other)


def test_many_lengths_are_looked_up_and_not_searched() -> None:
    phases = phases_of(DataConfig(sequence_length=256, lengths=tuple(f"{i}:256" for i in range(1, 3000))))
    assert len(phases) == 3000
    for tokens in (0, 1, 2999, 10**9):
        assert phase_at(phases, tokens) == [phase.tokens <= tokens for phase in phases].count(True) - 1
    assert phase_at([replace(phase, tokens=Asked(phase.tokens)) for phase in phases], 1500) == 1500
    assert 0 < Asked.times <= 13


def test_a_table_grows_in_tokens_and_batch() -> None:
    assert parse_table(("1e9:512", "2e9:1e3")) == [(1e9, 512), (2e9, 1000)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("1e9",), "'1e9' is not tokens:batch"),
        (("1e9:1.5",), "'1e9:1.5' is not tokens:batch"),
        (("1e9:64", "1e8:128"), "'1e8:128' must come after 1e"),
        (("1e9:64", "2e9:64"), "'2e9:64' must have a larger batch than 64"),
    ],
)
def test_a_wrong_word_is_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(words)


def test_what_to_skip_is_documents_of_prefixes_and_samples() -> None:
    words = ("data/a:3", "150", "c:/d:0-4", "data/a:10-10", "7-9")
    assert parse_skip(words) == {
        "data/a": [range(3, 4), range(10, 11)],
        "": [range(150, 151), range(7, 10)],
        "c:/d": [range(5)],
    }
    for word in ("a:", "a:-1", "a:1-", "x", "a:1-2-3", "a:²", ":5"):
        with pytest.raises(ValueError, match="prefix:document"):
            parse_skip((word,))
