"""Settings that are lists of words: "tokens:value", each value in effect from that many tokens of the run on; parts of
the data to leave out; named sets."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megahp.config.schema import Config, DataConfig


@dataclass(frozen=True)
class Phase:
    """A part of the run with one sequence length and one mixture of sources."""

    tokens: float  # of the run, at which the phase begins
    length: int  # tokens per sample
    weights: tuple[float, ...]  # one per source, 0 = unused in this phase; empty = in proportion to their tokens


def phases_of(data: DataConfig) -> list[Phase]:
    """Return the phases of the data, the first from 0 tokens on. Raises ValueError naming the wrong word."""
    lengths = [(0.0, data.sequence_length)]
    lengths += _parse_words(data.lengths, _parse_whole, "tokens:length, such as 4.7e11:8192, or one doubling:3")
    mixtures = [(0.0, data.weights)]
    form = "tokens:weights, such as 1e9:0.7,0.3"
    mixtures += _parse_words(data.mixtures, lambda text: tuple(map(float, text.split(","))), form)
    begins = sorted({tokens for tokens, _ in (*lengths, *mixtures)})
    return [Phase(tokens, _value_at(lengths, tokens), _value_at(mixtures, tokens)) for tokens in begins]


def longest(config: Config) -> int:
    """Return the tokens of the longest sequence the run trains on."""
    return max(phase.length for phase in phases_of(config.data))


def phase_at(phases: Sequence[Phase], tokens: int) -> int:
    """Return the index of the phase of a step that begins after this many tokens."""
    return bisect_right(phases, float(tokens), key=lambda phase: phase.tokens) - 1


def parse_table(words: tuple[str, ...]) -> list[tuple[float, int]]:
    """Return (tokens, batch) pairs, ascending in both. Raises ValueError naming the wrong word."""
    pairs = _parse_words(words, _parse_whole, "tokens:batch, such as 1e9:512")
    for word, (_, before), (_, batch) in zip(words[1:], pairs, pairs[1:], strict=False):
        if batch <= before:
            raise ValueError(f"{word!r} must have a larger batch than {before}")
    return pairs


def parse_skip(words: tuple[str, ...]) -> dict[str, list[range]]:
    """Return the documents of each prefix, and under "" the samples, of data.skip. Raises ValueError naming the wrong
    word."""
    skipped: dict[str, list[range]] = {}
    for word in words:
        prefix, colon, numbers = word.rpartition(":")
        first, dash, last = numbers.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)) or colon and not prefix:
            raise ValueError(f"{word!r} is not prefix:document, prefix:first-last, sample or first-last")
        skipped.setdefault(prefix, []).append(range(int(first), int(last) + 1))
    return skipped


def parse_validation(data: DataConfig) -> dict[str, str]:
    """Return the prefix of each set of data.validation. Raises ValueError naming the wrong word."""
    sets: dict[str, str] = {}
    for word in data.validation:
        name, _, prefix = word.partition(":")
        if not (name and prefix):
            raise ValueError(f"{word!r} is not name:prefix")
        if name in sets or name in data.train:
            raise ValueError(f"{word!r} has the name of another set or source; choose another")
        if prefix in data.train:
            raise ValueError(f"{word!r} is trained on; hold out other data")
        sets[name] = prefix
    return sets


def _parse_words(words: tuple[str, ...], parse: Callable[[str], Any], form: str) -> list[tuple[float, Any]]:
    pairs: list[tuple[float, Any]] = []
    last = 0.0
    for word in words:
        text, _, value = word.partition(":")
        try:
            tokens, parsed = float(text), parse(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{word!r} is not {form}") from None
        if not last < tokens < math.inf:
            raise ValueError(f"{word!r} must come after {last:g} tokens")
        pairs.append((tokens, parsed))
        last = tokens
    return pairs


def _parse_whole(text: str) -> int:
    if not (value := float(text)).is_integer():
        raise ValueError
    return int(value)


def _value_at(pairs: list[tuple[float, Any]], tokens: float) -> Any:
    """Return the value in effect at this many tokens."""
    return pairs[bisect_right(pairs, tokens, key=lambda pair: pair[0]) - 1][1]
