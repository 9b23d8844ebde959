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
import itertools
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megahp.errors import UserError, masked
from megahp.files import open_unlinked, refuse_links

Record = dict[str, Any]


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
        last = _rewrite(self.directory / "metrics.jsonl", lambda record: record.get("step", math.inf) <= step)
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

    `baselines` may hold `unigram` and `bigram` (nats per token); `config` and `sample` are the texts of config.toml
    and sample.txt, empty where there is none.
    """

    name: str
    steps: list[Record]
    events: list[Record]
    baselines: Record
    config: str
    sample: str

    def column(self, key: str) -> np.ndarray:
        """One number of every step, [steps] in float64; NaN where it is null or missing."""
        return np.array([record.get(key) for record in self.steps], dtype=np.float64)


def read_run(directory: Path) -> LoggedRun:
    """Read a run directory; UserError when it is none, is damaged, or has no steps yet."""
    refuse_links(directory)
    steps = read_metrics(directory)
    if not steps:
        raise UserError(f"{directory}/metrics.jsonl holds no step yet; wait for the first one to be logged")
    events, baselines = read_events(directory), directory / "baselines.json"
    counted = _parse(baselines.read_bytes()) if baselines.exists() else {}
    if counted is None:
        raise UserError(f"{baselines} is not a JSON object; write it again or remove it")
    places = (directory / "config.toml", directory / "sample.txt")
    texts = (place.read_text(encoding="utf-8", errors="replace") if place.exists() else "" for place in places)
    run = LoggedRun(directory.resolve().name, steps, events, counted, *texts)
    factor = _noise_to_total(run.config)
    for step in steps:  # versions before the total was logged wrote the norm layers' alone
        if "noise_scale_total" not in step and (noise := step.get("noise_scale")):
            step["noise_scale_total"] = noise * factor
    return run


def _noise_to_total(text: str) -> float:
    """Return batch.noise_to_total of a config.toml; its default where that says nothing."""
    try:
        return float(tomllib.loads(text)["batch"]["noise_to_total"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError):
        return 1.4


def read_metrics(directory: Path) -> list[Record]:
    """The steps a run logged, in order; UserError when the file is missing or damaged."""
    return _read(directory / "metrics.jsonl")


def read_events(directory: Path) -> list[Record]:
    """The events of a run, in order; UserError when the file is missing or damaged."""
    return _read(directory / "events.jsonl")


def _read(path: Path) -> list[Record]:
    try:
        with open(path, "rb") as file:
            records = [_parse(line) for line in file]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a run directory, such as runs/<name>") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if records and records[-1] is None:
        records.pop()  # torn by a crash, or still being written
    if None in records:
        raise UserError(f"{path} line {records.index(None) + 1} is not a JSON object; remove that line")
    return [record for record in records if record is not None]


def _parse(line: bytes) -> Record | None:
    """The object on a line, or None; a torn line never parses, for an object ends with its own brace."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _appending(path: Path) -> IO[str]:
    # Line buffered: a line is with the operating system as soon as it is complete.
    return open_unlinked(path, "a", buffering=1)


def _rewrite(path: Path, keep: Callable[[Record], bool]) -> Record | None:
    """Keep the lines whose object passes, byte for byte, in one atomic step; returns the last such object."""
    part, last = path.with_suffix(".part"), None
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
