"""Training runs that a measurement starts as child processes with `megahp train`, and how they ended."""

import contextlib
import fcntl
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np

from megahp.config import (
    AUTO,
    CheckpointConfig,
    Config,
    LogConfig,
    config_differences,
    config_to_toml,
    get_setting,
    parse_validation,
)
from megahp.config.resolve import read_config
from megahp.errors import UserError
from megahp.files import open_unlinked
from megahp.launch import die_with_parent
from megahp.log.metrics import newest_events, newest_metrics
from megahp.train.recovery import MAX_SKIPPED_IN_A_ROW


def for_search(config: Config, folder: Path) -> Config:
    """Return the settings of a search's runs: in this folder, with one checkpoint, and nothing logged that is not
    read. Raises UserError for settings of checkpoints and logs that this would ignore."""
    for key in ("checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.remote", "log.wandb"):
        if (value := get_setting(config, key)) != get_setting(Config(), key):
            raise UserError(f"{key} = {value!r} is not for the many runs of a search; remove it")
    log = LogConfig(root=str(folder), tensorboard=False, baselines=False)
    return replace(config, checkpoint=CheckpointConfig(every=config.checkpoint.every, keep=1), log=log)


def check_same_config(config: Config) -> None:
    """Raise UserError when the directory holds a run with another config, which must not be mistaken for this one."""
    if (config.directory / "config.toml").exists():
        for key, (before, now) in config_differences(read_config(config.directory), config).items():
            if now == AUTO or key == "batch.largest_micro_batch" and config.batch.micro_batch == AUTO:
                continue  # decided when that run began (train/auto_settings.py)
            trained = f"{config.directory} was trained with {key} = {before!r}"
            raise UserError(f"{trained}, not {now!r}; name another --out")


def train(config: Config, ranks: int, output: IO[str] | None = None, **environment: str) -> int:
    """Start or resume one run with `megahp train`. Returns its exit code; the run ends with this process.

    output: receives what it prints; environment: added to this process's.
    """
    file = write_run_file(config)
    command = [sys.executable, "-m", "megahp", "train", str(file), "--ranks", str(ranks), "--resume", "auto"]
    code = subprocess.call(command, stdout=output, env=os.environ | environment, preexec_fn=die_with_parent)
    return 128 - code if code < 0 else code  # a signal's number is negative here; shells add 128


def loss_of(config: Config, ranks: int) -> float:
    """Train one run, unless it has ended, with its output in train.log. Returns the mean loss of the sets of
    data.validation or, without any, the mixture's; infinite if the run diverged. Raises UserError if it did not end."""
    directory = config.directory
    directory.mkdir(parents=True, exist_ok=True)
    if not is_done(directory):
        with open_unlinked(directory / "train.log", "a") as log:
            code = train(config, ranks, log)
        if code and not has_diverged(directory):
            raise UserError(f"{directory} ended with exit code {code}; see its train.log; the same command resumes it")
    if has_diverged(directory):
        return math.inf
    last = next(newest_metrics(directory))
    sets = parse_validation(config.data)
    losses = [last["validation_losses"][name] for name in sets] if sets else [last["validation_loss"]]
    return math.inf if None in losses else float(np.mean(losses))  # none: not a number


def write_run_file(config: Config) -> Path:
    """Write the config as a run file beside its run directory, and return its path."""
    file = Path(f"{config.directory}.toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_unlinked(file, "w") as out:
        out.write(config_to_toml(config))
    return file


def is_done(directory: Path) -> bool:
    """Return whether nothing is left to train."""
    return is_finished(directory) or has_diverged(directory)


def is_finished(directory: Path) -> bool:
    """Return whether the run took all of its steps."""
    has_events = (directory / "events.jsonl").exists()
    return has_events and any(event["event"] == "finished" for event in newest_events(directory))


def has_diverged(directory: Path) -> bool:
    """Return whether the run gave up: too many steps in a row were skipped, or a weight is not finite."""
    if not (directory / "events.jsonl").exists():
        return False
    newest = list(itertools.islice(newest_events(directory), MAX_SKIPPED_IN_A_ROW))
    if newest and newest[0]["event"] == "broken":
        return True
    skipped = [event["step"] for event in newest if event["event"] == "skipped"]
    return len(skipped) == MAX_SKIPPED_IN_A_ROW and skipped[0] - skipped[-1] == MAX_SKIPPED_IN_A_ROW - 1


@contextlib.contextmanager
def claimed(file: Path, wait: bool = False) -> Iterator[bool]:
    """Yield whether this worker got a lock, which the kernel releases however the worker ends. wait: until it is free.
    Raises UserError for a file system without locks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_unlinked(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        except OSError as error:
            raise UserError(f"{file} cannot be locked ({error}); use a folder on a file system with locks") from None
        else:
            yield True
