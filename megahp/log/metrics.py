"""Write a run's metrics and events, and read them back.

A run directory holds `metrics.jsonl`, one object per logged step, and `events.jsonl`, one object per event (a batch
change, a resume, a skipped step). Both are append-only plain text, so that `tail -f`, `jq` and a report work during the
run, and a `kill -9` costs at most the line being written.

A metrics object has, in this order, the keys
    step, tokens, samples        counted since the start of the run, the step included
    loss                         nats per token, the mean over the global batch
    lr, weight_decay, global_batch
    batch_target                 sequences that the policy aims at, before its limits; null if it has no target
    grad_norm                    null beside `"skipped": true` if it was not finite
    grad_sq_example              mean ||g_b||^2 over the examples of the batch
    grad_sq_batch                ||G||^2 of the batch's mean gradient
    noise_scale                  of the norm layers, examples, smoothed; null if undefined
    noise_scale_total            the whole model's: noise_scale x batch.noise_to_total, averaged with calibration
    noise_scale_total_low, _high its 95 % interval over the newest blocks of steps; null if unknown or infinite
    noise_to_total               ratio of the whole model's to the norm layers', by calibration; null before
    noise_scale_tokens           noise_scale in tokens
    noise_scale_layers           {norm layer: examples or null}
    tokens_per_second, step_seconds
with the measured batch policy
    batch_bound_noise, batch_bound_stability    the largest batch that each allows, sequences
with mixture of experts, {router: number},
    expert_load_max              tokens of the most loaded expert over the mean
    expert_load_cv               standard deviation of the experts' tokens over the mean
    balance_loss                 the mean over sequences; 1 if balanced
with sparse weights
    density                      fraction of the entries of masked matrices that are not masked
with several sources
    epochs                       {prefix: how often its training documents were read}
after a validation
    validation_loss              nats per token, the mean over the held-out samples of the mixture
    validation_losses            {prefix of a source, or name of a set of data.validation: the mean over its samples}
A validation before the first step (train.validate_first) is an object with the counts and validation losses alone.
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
from typing import Any, BinaryIO

import numpy as np

from megahp.errors import UserError, complain, masked
from megahp.files import open_unlinked, read_json, refuse_irregular, refuse_links

Record = dict[str, Any]
LARGEST = 2**34  # bytes of a log: at some 3,000 a step of 24 layers, 5 million steps
NUMERIC = {int, float, bool, type(None)}
LAYERS = b'"noise_scale_layers": {'
NAMED = b'"epochs"', b'"validation_losses"'  # objects whose keys are a user's, and may hold braces
CHUNK = 256  # lines parsed at a time
BLOCK, LONGEST = 2**16, 2**24  # bytes: of a read from the end, of a line
END_OF_TIME = 253_402_300_799  # the year 9999, in seconds since 1970


class RunLog:
    """Writes one run's metrics and events; one process writes, usually rank 0."""

    def __init__(self, directory: Path, tensorboard: bool = False):
        """Open, or create, the logs in `directory`. Raises UserError if TensorBoard is requested but missing."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be created ({error.strerror}); name another one") from None
        self.directory = directory
        self.lost = False  # whether anything could not be written
        self.tensorboard = tensorboard
        self.step = 0
        self.tokens = 0
        self._open()

    def metrics(self, record: Record) -> None:
        """Write one step. Numbers must be Python's own: json writes these so that they read back exactly."""
        record = without_nan(record)
        self.step, self.tokens = record["step"], record["tokens"]
        with self._tolerate_write_errors():
            self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
            if self._board:
                for name, value in _scalars(record):
                    self._board.add_scalar(name, value, self.step)

    def event(self, event: str, reason: str, **inputs: Any) -> None:
        """Write one event, with what led to it in `inputs`.

        It is dated by the last logged step and tokens, unless `inputs` has `step=` and `tokens=`, and by the wall clock
        in seconds since 1970.
        """
        when = {"step": self.step, "tokens": self.tokens, "time": time.time()}
        record = without_nan({**when, "event": event, "reason": reason, **inputs})
        with self._tolerate_write_errors():
            self._events.write(masked(json.dumps(record, allow_nan=False)) + "\n")
            if self._board:
                self._board.add_text(event, reason, record["step"])

    def resume(self, step: int) -> None:
        """Remove the metrics after `step`, from which the run resumes (0: the start): those steps will be logged again.

        Events stay: they did happen. Lines that a crash truncated are removed from both files.
        """
        self.close()
        last = _rewrite(
            self.directory / "metrics.jsonl", lambda record: _are_steps([record]) and record["step"] <= step
        )
        _rewrite(self.directory / "events.jsonl", lambda record: True)
        self.step, self.tokens = (last["step"], last["tokens"]) if last else (0, 0)
        self._open(purge_step=step + 1)

    def begin_again(self) -> Path | None:
        """Start with empty metrics. Return the file that the old ones were moved to, under the next free number.

        The old ones belong to a run whose checkpoints are gone. Events stay: restarts are counted by them.
        """
        metrics, kept = self.directory / "metrics.jsonl", None
        if metrics.stat().st_size:
            numbered = (metrics.with_stem(f"metrics-{number}") for number in itertools.count(1))
            kept = metrics.rename(next(file for file in numbered if not file.exists()))
            metrics.touch()
        self.resume(0)
        return kept

    def close(self) -> None:
        """Close the files; only then are TensorBoard's last scalars on disk."""
        for file in filter(None, (self._metrics, self._events, self._board)):
            with self._tolerate_write_errors():
                file.close()

    @contextlib.contextmanager
    def _tolerate_write_errors(self) -> Iterator[None]:
        """Report the first write error and ignore the others: a full disk is no reason to stop training."""
        try:
            yield
        except OSError as error:
            if not self.lost:
                print(f"megahp: {self.directory} cannot be written ({error.strerror}); lines are lost", file=sys.stderr)
            self.lost = True

    def _open(self, purge_step: int | None = None) -> None:
        # Line buffered, so that a line is with the operating system, and survives kill -9, as soon as it is complete.
        self._metrics = open_unlinked(self.directory / "metrics.jsonl", "a", buffering=1)
        self._events = open_unlinked(self.directory / "events.jsonl", "a", buffering=1)
        self._board: Any = None
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("log.tensorboard = true, but tensorboard is missing; pip install tensorboard") from None
            self._board = SummaryWriter(str(self.directory / "tensorboard"), purge_step=purge_step)


@dataclass(frozen=True)
class LoggedRun:
    """A run directory as read: at least one step, and what else exists.

    columns: every number that was logged, [steps] in float64, NaN if null or missing.
    layers: the newest noise_scale_layers.
    baselines: may hold `unigram` and `bigram`, nats per token.
    config, sample: texts of config.toml and sample.txt, empty if missing.
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
        """Return one number of every step, [steps]; NaN if null or missing."""
        return self.columns.get(key, np.full(len(self.columns["step"]), np.nan))


def read_run(directory: Path) -> LoggedRun:
    """Read a run directory. Raises UserError if it is none, is damaged, or has no steps yet."""
    refuse_links(directory)
    columns, layers = _read_columns(directory / "metrics.jsonl")
    if not columns:
        raise UserError(f"{directory}/metrics.jsonl holds no step yet; wait for the first one to be logged")
    events, path = read_events(directory), directory / "baselines.json"
    baselines = read_json(path, "baselines", "write it again, or remove it") if path.exists() else {}
    if not _are_numbers([baselines]):
        raise UserError(f"{path} holds something other than numbers; write it again, or remove it")
    texts = ["", ""]
    for number, path in enumerate((directory / "config.toml", directory / "sample.txt")):
        if path.exists():
            refuse_irregular(path, "file", "remove it", LARGEST)
            texts[number] = path.read_text(encoding="utf-8", errors="replace")
    run = LoggedRun(directory.resolve().name, columns, layers, events, baselines, texts[0], texts[1], directory)
    # Logs of versions before noise_scale_total hold the norm layers' noise scale alone.
    try:
        noise_to_total = float(tomllib.loads(run.config)["batch"]["noise_to_total"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
        noise_to_total = 1.4  # the setting's default
    total, derived = run.column("noise_scale_total"), run.column("noise_scale") * noise_to_total
    columns["noise_scale_total"] = np.where(np.isnan(total), derived, total)
    return run


def read_metrics(directory: Path) -> list[Record]:
    """Return every step a run logged, in order. Raises UserError if the file is missing."""
    return list(itertools.chain.from_iterable(_read(directory / "metrics.jsonl", _are_steps)))


def read_events(directory: Path) -> list[Record]:
    """Return the events of a run, in order. Raises UserError if the file is missing."""
    return list(itertools.chain.from_iterable(_read(directory / "events.jsonl", _are_events)))


def newest_metrics(directory: Path) -> Iterator[Record]:
    """Yield the steps a run logged, newest first, reading only as much of the file as is consumed."""
    return _read_backwards(directory / "metrics.jsonl", _are_steps)


def newest_events(directory: Path) -> Iterator[Record]:
    """Yield the events of a run, newest first, reading only as much of the file as is consumed."""
    return _read_backwards(directory / "events.jsonl", _are_events)


def _read(
    path: Path, are_valid: Callable[[list[Any]], bool], preprocess: Callable[[bytes], bytes] = bytes
) -> Iterator[list[Record]]:
    """Yield the objects of a log, in order and in chunks. Invalid lines are skipped, and counted on stderr.

    preprocess: applied to each line before it is parsed.
    """
    damaged, number, lines = list[int](), 0, [b""]
    with _opened(path) as file:
        rest = iter(lambda: file.readline(LONGEST), b"")
        while chunk := list(itertools.islice(rest, CHUNK)):
            lines, records = chunk, _parse_all(list(map(preprocess, chunk)))
            if not are_valid(records):
                damaged += [number + i for i, record in enumerate(records, start=1) if not are_valid([record])]
                records = [record for record in records if are_valid([record])]
            number += len(lines)
            yield records
    if damaged and damaged[-1] == number and not lines[-1].endswith(b"\n"):
        damaged.pop()  # truncated by a crash, or still being written
    if damaged:
        _warn(
            f"{path}: skipped {len(damaged):,} damaged line{'s' * (len(damaged) > 1)}, the first is line {damaged[0]}"
        )


def _read_backwards(path: Path, are_valid: Callable[[list[Any]], bool]) -> Iterator[Record]:
    """Yield the objects of a log, the last first."""
    with _opened(path) as file:
        position, rest = file.seek(0, os.SEEK_END), b""
        is_last = True
        while position:
            size = min(max(BLOCK, len(rest)), position)  # doubles what is held while a line has not ended
            if size > LONGEST:
                raise UserError(f"{path} holds a line of more than {LONGEST:,} bytes; remove it")
            position = file.seek(position - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed([rest, *lines] if position == 0 else lines):
                record = _parse(line)
                if record is not None and are_valid([record]):
                    yield record
                elif not is_last:  # a last line without its end is still being written
                    _warn(f"{path}: skipped damaged lines")
                is_last = False


def _read_columns(path: Path) -> tuple[dict[str, np.ndarray], Record]:
    """Return every number of every step as a column, and the newest noise_scale_layers.

    Objects inside a step, which make up most of a line and are needed at the end only, are cut out before parsing, but
    for those with a user's names, which come last. A validation before the first step is no step.
    """
    newest_layers = b"{}"

    def cut_objects(line: bytes) -> bytes:
        nonlocal newest_layers
        if LAYERS in line:
            newest_layers = line
        while (start := line.find(b": {")) >= 0 and (end := line.find(b"}", start)) >= 0:
            if line.endswith(NAMED, 0, start):
                break
            line = line[:start] + b": null" + line[end + 1 :]
        return line

    parts, count = list[tuple[int, dict[str, np.ndarray]]](), 0
    for records in _read(path, _are_steps, cut_objects):
        chunk = [step for step in records if "loss" in step or "validation_loss" not in step]
        keys = dict.fromkeys(itertools.chain.from_iterable(chunk)).keys() - {name.decode()[1:-1] for name in NAMED}
        parts.append((count, {key: np.array([step.get(key) for step in chunk], dtype=np.float64) for key in keys}))
        count += len(chunk)
    columns: dict[str, np.ndarray] = {}
    for start, part in parts:
        for key, values in part.items():
            columns.setdefault(key, np.full(count, np.nan))[start : start + len(values)] = values
    return columns, (_parse(newest_layers) or {}).get("noise_scale_layers") or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a log for reading. Raises UserError, also for anything but a regular file: a pipe might never end."""
    try:
        refuse_irregular(path, "log", "move it away", LARGEST)
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a run directory, such as runs/<name>") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


_warn = functools.cache(complain)  # once per message, however often a log is read


def _reject_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_reject_constant)  # refuses NaN and Infinity, which are not JSON


def _parse_all(lines: list[bytes]) -> list[Any]:
    """Parse lines in one call, which is faster, or one by one if a line is damaged."""
    try:
        records = DECODER.decode(f"[{','.join(map(bytes.decode, lines))}]")
    except (ValueError, RecursionError):
        records = []
    return records if len(records) == len(lines) else list(map(_parse, lines))


def _parse(line: bytes) -> Record | None:
    """Return the object on a line, or None. A truncated line never parses, since an object ends with its own brace."""
    try:
        record = DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _are_steps(records: list[Any]) -> bool:
    """Return whether all are objects with a step and tokens, and numbers otherwise. One call for many is faster."""
    try:
        values = list(itertools.chain.from_iterable(map(dict.values, records)))
        return _are_counts([record[key] for record in records for key in ("step", "tokens")]) and _are_numbers(values)
    except (KeyError, TypeError):
        return False


def _are_events(records: list[Any]) -> bool:
    """Return whether all are objects with an event, its reason, step and tokens, and a time."""
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
    """Return whether all are finite numbers, true, false, null, or objects of such."""
    kinds = {*map(type, values)}
    if dict in kinds:
        nested = [inner for value in values if type(value) is dict for inner in value.values()]
        values, kinds = [value for value in values if type(value) is not dict], kinds - {dict}
        if not _are_numbers(nested):
            return False
    try:
        return kinds <= NUMERIC and math.isfinite(sum(filter(None, values)))  # one NaN or infinity makes the sum one
    except OverflowError:  # an integer too large for a float
        return False


def _rewrite(path: Path, keep: Callable[[Record], bool]) -> Record | None:
    """Keep the lines whose object passes, byte for byte, in one atomic step. Return the last such object."""
    part, last = path.with_suffix(".part"), None
    refuse_irregular(path, "log", "move it away", LARGEST)
    with open(path, "rb") as old, open_unlinked(part, "wb") as new:
        for line in old:
            record = _parse(line)
            if record is not None and keep(record):
                new.write(line.rstrip(b"\n") + b"\n")  # the last object may lack its newline
                last = record
        new.flush()
        os.fsync(new.fileno())
    os.replace(part, path)
    return last


def without_nan(value: Any) -> Any:
    """Return the value with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record and their names for TensorBoard, those of nested objects as parent/child."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value
