"""Settings that are lists of words, each "tokens:value": what holds from some tokens of the run on."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megahp.config.schema import DataConfig


@dataclass(frozen=True)
class Phase:
    """What the data is from some tokens of the run on."""

    tokens: float
    length: int  # tokens of one sample
    weights: tuple[float, ...]  # one a source, 0 = not now; empty = in proportion to their tokens


def phases_of(data: DataConfig) -> list[Phase]:
    """The stages of the data, the first from 0 tokens on. Raises ValueError naming the word that is wrong."""
    lengths = [
        (0.0, data.sequence_length),
        *_parse_words(data.lengths, _parse_whole, "tokens:length, such as 4.7e11:8192"),
    ]
    mixtures = [
        (0.0, data.weights),
        *_parse_words(
            data.mixtures, lambda text: tuple(map(float, text.split(","))), "tokens:weights, such as 1e9:0.7,0.3"
        ),
    ]
    begins = sorted({tokens for tokens, _ in (*lengths, *mixtures)})
    return [Phase(tokens, _reached(lengths, tokens), _reached(mixtures, tokens)) for tokens in begins]


def phase_at(phases: Sequence[Phase], tokens: int) -> int:
    """The number of the stage that a step beginning after so many tokens belongs to."""
    return bisect_right(phases, float(tokens), key=lambda phase: phase.tokens) - 1


def parse_table(words: tuple[str, ...]) -> list[tuple[float, int]]:
    """(tokens, batch) pairs, ascending in both. Raises ValueError naming the word that is wrong."""
    pairs = _parse_words(words, _parse_whole, "tokens:batch, such as 1e9:512")
    for word, (_, before), (_, batch) in zip(words[1:], pairs, pairs[1:], strict=False):
        if batch <= before:
            raise ValueError(f"{word!r} must have a larger batch than {before}")
    return pairs


def _parse_words(words: tuple[str, ...], parse: Callable[[str], Any], form: str) -> list[tuple[float, Any]]:
    pairs: list[tuple[float, Any]] = []
    for word in words:
        tokens, _, value = word.partition(":")
        try:
            pair = float(tokens), parse(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{word!r} is not {form}") from None
        if not (pairs[-1][0] if pairs else 0) < pair[0] < math.inf:
            raise ValueError(f"{word!r} must come after {pairs[-1][0] if pairs else 0:g} tokens")
        pairs.append(pair)
    return pairs


def _parse_whole(text: str) -> int:
    if not (value := float(text)).is_integer():
        raise ValueError
    return int(value)


def _reached(pairs: list[tuple[float, Any]], tokens: float) -> Any:
    """The last value whose tokens are reached."""
    return pairs[bisect_right(pairs, tokens, key=lambda pair: pair[0]) - 1][1]
