"""What a run writes down as it goes, and how it is read back.

A run directory holds `metrics.jsonl`, one object for every logged step, and `events.jsonl`, one object for
every event (a batch change, a resume, a skipped step). Both are append-only plain text, so that `tail -f`,
`jq` and a report work while the run is going, and a `kill -9` costs at most the line being written.

A metrics object has, in this order, the keys
    step, tokens, samples        counted since the start of the run, the step included
    loss                         nats per token, the mean over the global batch
    lr, weight_decay, global_batch
    batch_target                 sequences the policy aims at now, before its limits; null where at nothing
    grad_norm                    null beside `"skipped": true` where it was not finite
    grad_sq_example              mean ||g_b||^2 over the examples of the batch
    grad_sq_batch                ||G||^2 of the batch's mean gradient
    noise_scale                  of the norm layers, examples, smoothed; null where it means nothing
    noise_scale_total            the whole model's: noise_scale x batch.noise_to_total, averaged with calibration
    noise_scale_total_low, _high its 95 % interval over the newest blocks of steps; null where unknown or infinite
    noise_to_total               the whole model's over the norm layers' by calibration; null before
    noise_scale_tokens           noise_scale in tokens
    noise_scale_layers           {norm layer: examples or null}
    tokens_per_second, step_seconds
of a measured batch
    batch_bound_noise, batch_bound_stability    the largest batch that each allows, sequences
of a mixture of experts, {router: number},
    expert_load_max              tokens of the fullest expert over those of the mean one
    expert_load_cv               standard deviation of the experts' tokens over their mean
    balance_loss                 the mean over sequences; 1 where they are balanced
of sparse weights
    density                      share of the entries of the masked matrices that are not masked
and where it is known `validation_loss`.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from megahp.errors import UserError, complain, masked
from megahp.files import open_unlinked, read_json, refuse_irregular, refuse_links

Record = dict[str, Any]
LARGEST = 2**34  # bytes of a log: at some 3,000 a step of 24 layers, 5 million steps
NUMERIC = {int, float, bool, type(None)}
LAYERS = b'"noise_scale_layers": {'
CHUNK = 256  # lines that are parsed at a time
BLOCK, LONGEST = 2**16, 2**24  # bytes: of a read from the end, of a line
END_OF_TIME = 253_402_300_799  # the year 9999, in seconds since 1970


class RunLog:
    """Writes one run's metrics and events; one process writes, usually rank 0."""

    def __init__(self, directory: Path, tensorboard: bool = False):
        """Open, or create, the logs in `directory`; UserError when TensorBoard is asked for and missing."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made ({error.strerror}); name another one") from None
        self.directory = directory
        self.lost = False  # whether something could not be written
        self.tensorboard = tensorboard
        self.step = 0
        self.tokens = 0
        self._open()

    def metrics(self, record: Record) -> None:
        """Write one step; numbers must be Python's own, which are written so that they read back exactly."""
        record = without_nan(record)
        self.step, self.tokens = record["step"], record["tokens"]
        with self._sparing():
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            if self._board:
                for name, value in _scalars(record):
                    self._board.add_scalar(name, value, self.step)

    def event(self, event: str, reason: str, **inputs: Any) -> None:
        """Write one event, what led to it in `inputs`.

        It is dated with the last logged step and tokens unless `inputs` says `step=` and `tokens=`, and with
        the wall clock in seconds since 1970.
        """
        when = {"step": self.step, "tokens": self.tokens, "time": time.time()}
        record = without_nan({**when, "event": event, "reason": reason, **inputs})
        with self._sparing():
            self._events.write(masked(json.dumps(record, allow_nan=False)) + "\n")
            if self._board:
                self._board.add_text(event, reason, record["step"])

    def resume(self, step: int) -> None:
        """Forget the metrics after `step`, the step the run goes on from (0: from the beginning).

        The steps after it will be taken, and logged, again. Events stay: they did happen. Lines that a crash
        left torn are dropped from both.
        """
        self.close()
        metrics = self.directory / "metrics.jsonl"
        last = _rewrite(metrics, lambda record: _are_steps([record]) and record["step"] <= step)
        _rewrite(self.directory / "events.jsonl", lambda record: True)
        self.step, self.tokens = (last["step"], last["tokens"]) if last else (0, 0)
        self._open(purge_step=step + 1)

    def begin_again(self) -> Path | None:
        """Begin with empty metrics. Those of a run whose checkpoints are gone are kept beside them, under the next free
        number, and their file is returned. Events stay: they did happen, and restarts are counted by them."""
        metrics, kept = self.directory / "metrics.jsonl", None
        if metrics.stat().st_size:
            numbered = (metrics.with_stem(f"metrics-{number}") for number in itertools.count(1))
            kept = metrics.rename(next(file for file in numbered if not file.exists()))
            metrics.touch()
        self.resume(0)
        return kept

    def close(self) -> None:
        """Close the files; TensorBoard's last scalars are on disk only after this."""
        for file in filter(None, (self._metrics, self._events, self._board)):
            with self._sparing():
                file.close()

    @contextlib.contextmanager
    def _sparing(self) -> Iterator[None]:
        """Go on without what cannot be written, having said so once: a full disk is no reason to stop training."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                print(f"megahp: {self.directory} cannot be written ({error.strerror}); lines are lost", file=sys.stderr)
            self.lost = True

    def _open(self, purge_step: int | None = None) -> None:
        self._metrics = _appending(self.directory / "metrics.jsonl")
        self._events = _appending(self.directory / "events.jsonl")
        self._board: Any = None
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("TensorBoard was asked for and is missing; pip install tensorboard") from None
            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=purge_step)


@dataclass(frozen=True)
class LoggedRun:
    """A run directory, read: at least one step, and what else there is.

    `columns` holds every number that was logged, [steps] in float64, NaN where it is null or missing; `layers` the
    newest noise_scale_layers. `baselines` may hold `unigram` and `bigram` (nats per token); `config` and `sample` are
    the texts of config.toml and sample.txt, empty where there is none.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    layers: Record
    events: list[Record]
    baselines: Record
    config: str
    sample: str
    directory: Path

    def column(self, key: str) -> np.ndarray:
        """One number of every step, [steps]; NaN where it is null or missing."""
        return self.columns.get(key, np.full(len(self.columns["step"]), np.nan))


def read_run(directory: Path) -> LoggedRun:
    """Read a run directory; UserError when it is none, is damaged, or has no steps yet."""
    refuse_links(directory)
    columns, layers = _read_columns(directory / "metrics.jsonl")
    if not columns:
        raise UserError(f"{directory}/metrics.jsonl holds no step yet; wait for the first one to be logged")
    events, baselines = read_events(directory), directory / "baselines.json"
    counted = read_json(baselines, "baselines", "write it again, or remove it") if baselines.exists() else {}
    if not _are_numbers([counted]):
        raise UserError(f"{baselines} holds something other than numbers; write it again, or remove it")
    places = (directory / "config.toml", directory / "sample.txt")
    there = [place for place in places if place.exists()]
    for place in there:
        refuse_irregular(place, "file", "remove it", LARGEST)
    config, sample = (place.read_text(encoding="utf-8", errors="replace") if place in there else "" for place in places)
    run = LoggedRun(directory.resolve().name, columns, layers, events, counted, config, sample, directory)
    # versions before the total was logged wrote the norm layers' alone
    total, derived = run.column("noise_scale_total"), run.column("noise_scale") * _noise_to_total(run.config)
    columns["noise_scale_total"] = np.where(np.isnan(total), derived, total)
    return run


def _noise_to_total(text: str) -> float:
    """Return batch.noise_to_total of a config.toml; its default where that says nothing."""
    try:
        return float(tomllib.loads(text)["batch"]["noise_to_total"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
        return 1.4


def read_metrics(directory: Path) -> list[Record]:
    """Return every step a run logged, in order. Raises UserError when the file is missing."""
    return list(itertools.chain.from_iterable(_read(directory / "metrics.jsonl", _are_steps)))


def read_events(directory: Path) -> list[Record]:
    """Return the events of a run, in order. Raises UserError when the file is missing."""
    return list(itertools.chain.from_iterable(_read(directory / "events.jsonl", _are_events)))


def newest_metrics(directory: Path) -> Iterator[Record]:
    """Yield the steps a run logged, the newest first, reading no more of the file than is asked for."""
    return _read_backwards(directory / "metrics.jsonl", _are_steps)


def newest_events(directory: Path) -> Iterator[Record]:
    """Yield the events of a run, the newest first, reading no more of the file than is asked for."""
    return _read_backwards(directory / "events.jsonl", _are_events)


def _read(
    path: Path, are_right: Callable[[list[Any]], bool], text_of: Callable[[bytes], bytes] = bytes
) -> Iterator[list[Record]]:
    """Yield the objects of a log, in order, some at a time. Lines that are no such objects are skipped, and counted on
    stderr.

    text_of: what of a line is read.
    """
    damaged, number, lines = list[int](), 0, [b""]
    with _opened(path) as file:
        rest = iter(lambda: file.readline(LONGEST), b"")
        while chunk := list(itertools.islice(rest, CHUNK)):
            lines, found = chunk, _parse_all(list(map(text_of, chunk)))
            if not are_right(found):
                damaged += [number + place for place, one in enumerate(found, start=1) if not are_right([one])]
                found = [one for one in found if are_right([one])]
            number += len(lines)
            yield found
    if damaged and damaged[-1] == number and not lines[-1].endswith(b"\n"):
        damaged.pop()  # torn by a crash, or still being written
    if damaged:
        _say(f"{path}: skipped {len(damaged):,} damaged line{'s' * (len(damaged) > 1)}, the first is line {damaged[0]}")


def _read_backwards(path: Path, are_right: Callable[[list[Any]], bool]) -> Iterator[Record]:
    """Yield the objects of a log, the last first."""
    with _opened(path) as file:
        position, rest = file.seek(0, os.SEEK_END), b""
        is_last = True
        while position:
            size = min(max(BLOCK, len(rest)), position)  # twice as much for a line that is longer
            if size > LONGEST:
                raise UserError(f"{path} holds a line of more than {LONGEST:,} bytes; remove it")
            position = file.seek(position - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed([rest, *lines] if position == 0 else lines):
                record = _parse(line)
                if record is not None and are_right([record]):
                    yield record
                elif not is_last:  # a last line without its end is still being written
                    _say(f"{path}: skipped damaged lines")
                is_last = False


def _read_columns(path: Path) -> tuple[dict[str, np.ndarray], Record]:
    """Return every number of every step as a column, and the newest noise scales of layers.

    Objects inside a step, most of a line and of no use but at the end, are cut out before it is parsed.
    """
    nested = b"{}"

    def flat(line: bytes) -> bytes:
        nonlocal nested
        if LAYERS in line:
            nested = line
        while (start := line.find(b": {")) >= 0 and (end := line.find(b"}", start)) >= 0:
            line = line[:start] + b": null" + line[end + 1 :]
        return line

    parts, count = list[tuple[int, dict[str, np.ndarray]]](), 0
    for chunk in _read(path, _are_steps, flat):
        keys = dict.fromkeys(itertools.chain.from_iterable(chunk))
        parts.append((count, {key: np.array([step.get(key) for step in chunk], dtype=np.float64) for key in keys}))
        count += len(chunk)
    columns: dict[str, np.ndarray] = {}
    for start, part in parts:
        for key, values in part.items():
            columns.setdefault(key, np.full(count, np.nan))[start : start + len(values)] = values
    return columns, (_parse(nested) or {}).get("noise_scale_layers") or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, to be read: of a pipe nobody knows when it ends. Raises UserError."""
    try:
        refuse_irregular(path, "log", "move it away", LARGEST)
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a run directory, such as runs/<name>") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


@functools.cache  # once, however often a log is read
def _say(text: str) -> None:
    complain(text)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)  # without NaN and Infinity, which are not JSON


def _parse_all(lines: list[bytes]) -> list[Any]:
    """What is on each line: parsed at once, which is quicker, or one by one where a line is damaged."""
    try:
        found = DECODER.decode(f"[{','.join(map(bytes.decode, lines))}]")
    except (ValueError, RecursionError):
        found = []
    return found if len(found) == len(lines) else list(map(_parse, lines))


def _parse(line: bytes) -> Record | None:
    """The object on a line, or None; a torn line never parses, for an object ends with its own brace."""
    try:
        record = DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _are_steps(records: list[Any]) -> bool:
    """Whether these are objects with a step and tokens, and otherwise numbers: checked at once, which is quicker."""
    try:
        values = list(itertools.chain.from_iterable(map(dict.values, records)))
        return _are_counts([record[key] for record in records for key in ("step", "tokens")]) and _are_numbers(values)
    except (KeyError, TypeError):
        return False


def _are_events(records: list[Any]) -> bool:
    """Whether these are objects with an event, its reason, step and tokens, and a time."""
    try:
        counts = [record[key] for record in records for key in ("step", "tokens")]
        words = {type(record[key]) for record in records for key in ("event", "reason")}
        are_dated = all(0 <= record["time"] < END_OF_TIME for record in records)
        return are_dated and words <= {str} and _are_counts(counts)
    except (KeyError, TypeError):
        return False


def _are_counts(values: list[Any]) -> bool:
    return {*map(type, values)} <= {int} and all(0 <= value < 2**63 for value in values)


def _are_numbers(values: list[Any]) -> bool:
    """Whether these are finite numbers, true, false, null, and objects of such."""
    kinds = {*map(type, values)}
    if dict in kinds:
        nested = [inner for value in values if type(value) is dict for inner in value.values()]
        values, kinds = [value for value in values if type(value) is not dict], kinds - {dict}
        if not _are_numbers(nested):
            return False
    try:
        return kinds <= NUMERIC and math.isfinite(sum(filter(None, values)))
    except OverflowError:  # a whole number that is no float
        return False


def _appending(path: Path) -> IO[str]:
    # Line buffered: a line is with the operating system as soon as it is complete.
    return open_unlinked(path, "a", buffering=1)


def _rewrite(path: Path, keep: Callable[[Record], bool]) -> Record | None:
    """Keep the lines whose object passes, byte for byte, in one atomic step; returns the last such object."""
    part, last = path.with_suffix(".part"), None
    refuse_irregular(path, "log", "move it away", LARGEST)
    with open(path, "rb") as old, open_unlinked(part, "wb") as new:
        for line in old:
            record = _parse(line)
            if record is not None and keep(record):
                new.write(line.rstrip(b"\n") + b"\n")  # a whole object may lack its newline alone
                last = record
        new.flush()
        os.fsync(new.fileno())
    os.replace(part, path)
    return last


def without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value
