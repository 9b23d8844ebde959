"""A window of a series as tokens: how its numbers are scaled, binned and ordered. It is a run's tokenizer, a *.series
file, which `megahp preprocess --series` writes.

A window of C given values and H values to forecast, of L levels, is 1 + (C + H) L tokens: a begin token, and then the L
digits of each value, in the window's order. Ids: those of the first level's bins, of the second's, ..., a missing
value's digit, the begin token. Documents are such windows, all of the same length, so that a run whose
data.sequence_length is that length reads one window a sample, and predicts each token but the begin tokens, which
stand alone among their like: their loss is 0, and so is that of missing values.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megahp.errors import UserError
from megahp.files import read_json, replace_text
from megahp.series.binning import Binning
from megahp.series.order import ORDERS, Order, window_order

SUFFIX = ".series"
MOST_INTERVALS, MOST_VALUES = 10_000_000, 1_000_000  # of a file that others may have written


@dataclass(frozen=True)
class Scale:
    """The smallest given value of each window and their span (float64 [...]): z = (y - minimum) / span."""

    minimum: np.ndarray
    span: np.ndarray

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return z of values [..., n]; NaN where the span is 0."""
        return (values - self.minimum[..., None]) / np.where(self.span > 0, self.span, np.nan)[..., None]

    def undo(self, z: np.ndarray) -> np.ndarray:
        """Return the values of z [..., n]."""
        return self.minimum[..., None] + self.span[..., None] * z


@dataclass(frozen=True)
class SeriesCoding:
    """What turns windows into tokens and back. conditioning, horizon: values that are given, and to forecast."""

    binning: Binning
    conditioning: int
    horizon: int
    sub_series: int = 1
    order: Order = "regular"

    def __post_init__(self) -> None:
        """Raise UserError for what is no coding."""
        binning, k = self.binning, self.sub_series
        numbers = binning.low, binning.high, *binning.tails
        problems = {
            f"levels {list(binning.levels)} need at least 2 bins each": min(binning.levels, default=0) < 2,
            f"levels {list(binning.levels)} tell more than {MOST_INTERVALS:,} intervals apart": binning.levels
            and binning.intervals > MOST_INTERVALS,
            f"range {binning.low:g} to {binning.high:g} must be finite and ascending": not (
                all(map(math.isfinite, numbers)) and binning.low < binning.high
            ),
            f"tails {binning.tails} must be above 0": min(binning.tails) <= 0,
            f"a window of {self.conditioning} given values needs 2 to {MOST_VALUES:,}": not (
                2 <= self.conditioning <= MOST_VALUES
            ),
            f"a horizon of {self.horizon} needs 1 to {MOST_VALUES:,}": not 1 <= self.horizon <= MOST_VALUES,
            f"{k} sub-series do not divide a horizon of {self.horizon}": k < 1 or self.horizon % k,
            f"order {self.order!r} is none of {', '.join(ORDERS)}": self.order not in ORDERS,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise UserError(f"coding of series: {problem}; choose others")

    @property
    def levels(self) -> tuple[int, ...]:
        return self.binning.levels

    @property
    def missing(self) -> int:
        """The id of each digit of a missing value."""
        return sum(self.levels)

    @property
    def begin(self) -> int:
        """The id of a window's first token."""
        return self.missing + 1

    @property
    def vocab_size(self) -> int:
        return self.missing + 2

    @property
    def window(self) -> int:
        """Values of a window."""
        return self.conditioning + self.horizon

    @property
    def window_tokens(self) -> int:
        """Tokens of a window, which data.sequence_length must be."""
        return 1 + self.window * len(self.levels)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a window's given part."""
        return 1 + self.conditioning * len(self.levels)

    @property
    def horizon_tokens(self) -> int:
        """Tokens of a window's forecast."""
        return self.horizon * len(self.levels)

    @cached_property
    def times(self) -> np.ndarray:
        """The time within the window of the value at each place (int64 [window])."""
        return window_order(self.conditioning, self.horizon, self.sub_series, self.order)

    @cached_property
    def _first_ids(self) -> np.ndarray:
        return np.cumsum((0, *self.levels[:-1]))

    def ids_at(self, place: int) -> range:
        """Return the ids that the forecast's token at this place (0 .. horizon_tokens) can be: its level's."""
        level = place % len(self.levels)
        first = int(self._first_ids[level])
        return range(first, first + self.levels[level])

    def scale(self, given: np.ndarray) -> Scale:
        """Return the scale of windows by their given values [..., n], n >= 1, NaN = missing. The span is 0 where they
        are all alike, NaN where all are missing or it overflows: no forecast can be made of those."""
        none = np.isnan(given).all(-1)
        low = np.where(none, np.nan, np.where(np.isnan(given), np.inf, given).min(-1))
        high = np.where(none, np.nan, np.where(np.isnan(given), -np.inf, given).max(-1))
        with np.errstate(over="ignore"):
            span = high - low
        return Scale(low, np.where(np.isfinite(span), span, np.nan))

    def encode(self, values: np.ndarray) -> tuple[np.ndarray, Scale]:
        """Return the tokens (int64 [..., window_tokens]) of windows (float [..., window], in order of time, NaN =
        missing), and their scale."""
        scale = self.scale(values[..., : self.conditioning])
        return self._tokens(scale.apply(values), self.times), scale

    def prompt(self, given: np.ndarray) -> tuple[np.ndarray, Scale]:
        """Return the tokens (int64 [..., prompt_tokens]) of the last `conditioning` values of [..., n], and their
        scale; values before the first are missing."""
        short = max(0, self.conditioning - given.shape[-1])
        padding = [(0, 0)] * (given.ndim - 1) + [(short, 0)]
        given = np.pad(given.astype(np.float64), padding, constant_values=np.nan)[..., -self.conditioning :]
        scale = self.scale(given)
        return self._tokens(scale.apply(given), self.times[: self.conditioning]), scale

    def forecast(self, tokens: np.ndarray, u: np.ndarray | float = 0.5) -> np.ndarray:
        """Return z (float64 [..., horizon], in order of time) of a forecast's tokens [..., horizon_tokens], each at the
        quantile u [..., horizon] of its interval: uniform random numbers make a sample of it, 0.5 its middle."""
        digits = tokens.reshape(*tokens.shape[:-1], self.horizon, len(self.levels)) - self._first_ids
        return self._in_time(self.binning.decode(digits, u))

    def nats(self, losses: np.ndarray, values: np.ndarray, scale: Scale) -> np.ndarray:
        """Return -log p of the forecast's values (float64 [..., horizon], in order of time) in their own unit.

        losses [..., horizon_tokens]: those of its tokens, in nats. values [..., horizon]: in order of time. The product
        of a value's bins' probabilities, times the density in its interval, divided by the span.
        """
        of_bins = losses.reshape(*losses.shape[:-1], self.horizon, len(self.levels)).sum(-1)
        inside = self.binning.log_density(scale.apply(values))
        return self._in_time(of_bins) - inside + np.log(scale.span)[..., None]

    def windows(self, series: np.ndarray, stride: int) -> Iterator[np.ndarray]:
        """Yield windows (float64 [window]) of a series, `stride` apart, the last at its end. The first ones begin with
        missing values, and have a history of at least `horizon` values, or all that are given."""
        earlier = max(0, self.conditioning - self.horizon)
        padded = np.pad(series.astype(np.float64), (earlier, 0), constant_values=np.nan)
        last = len(padded) - self.window
        for start in range(last % stride, last + 1, stride):
            yield padded[start : start + self.window]

    def save(self, path: Path) -> None:
        """Write the file. Raises OSError."""
        replace_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @property
    def fingerprint(self) -> str:
        """Return a hash of the coding."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def _tokens(self, z: np.ndarray, times: np.ndarray) -> np.ndarray:
        digits = self.binning.encode(z[..., times])  # [..., n, levels]
        ids = np.where(digits < 0, self.missing, digits + self._first_ids).reshape(*z.shape[:-1], -1)
        return np.concatenate((np.full((*z.shape[:-1], 1), self.begin), ids), -1)

    def _in_time(self, values: np.ndarray) -> np.ndarray:
        """Put values of the forecast [..., horizon] from the order of places into that of time."""
        found = np.empty_like(values)
        found[..., self.times[self.conditioning :] - self.conditioning] = values
        return found


def load_coding(path: Path) -> SeriesCoding:
    """Read a *.series file. Raises UserError for one that is missing, or holds anything else than a coding."""
    remedy = "write it with `megahp preprocess --series`"
    found = read_json(path, "coding of series", remedy)
    try:
        binning = _fields(found["binning"], levels=int, low=float, high=float, tails=float)
        window = _fields(found, conditioning=int, horizon=int, sub_series=int, order=str)
        if len(binning["tails"]) != 2:
            raise ValueError("tails are two numbers")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"coding of series {path} cannot be used: {why}; {remedy}") from None
    try:
        return SeriesCoding(Binning(**binning), **window)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _fields(found: Mapping[str, Any], **kinds: type) -> dict[str, Any]:
    """Return these fields, of these types; levels and tails are lists of them. Raises KeyError and TypeError."""
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        value, is_list = found[name], name in ("levels", "tails")
        items: Sequence[Any] = value if is_list and isinstance(value, list) else [value]
        allowed = (int, float) if kind is float else (kind,)
        if is_list != isinstance(value, list) or any(type(item) not in allowed for item in items):
            raise TypeError(f"{name} = {value!r} is not of type {kind.__name__}")
        values[name] = tuple(map(kind, items)) if is_list else kind(value)
    return values
