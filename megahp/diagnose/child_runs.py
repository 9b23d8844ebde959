"""Runs that a measurement trains by the real command, as processes of its own, and how they ended."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from megahp.config import Config, config_differences, config_to_toml
from megahp.errors import UserError
from megahp.launch import die_with_parent
from megahp.log.metrics import newest_events
from megahp.train.recovery import MOST_SKIPPED
from megahp.train.run import read_config


def check_same_config(config: Config) -> None:
    """Raise UserError when the directory holds a branch of another measurement, not to be taken for this one."""
    if (config.directory / "config.toml").exists():
        for key, (before, now) in config_differences(read_config(config.directory), config).items():
            trained = f"{config.directory} was trained with {key} = {before!r}"
            raise UserError(f"{trained}, not {now!r}; name another --out")


def train(config: Config, ranks: int, said: IO[str] | None = None, **environment: str) -> int:
    """Begin, or go on with, one branch through the real command, in an environment that has this too; what it says goes
    into a file, if there is one. Returns its exit code. It does not outlive this process."""
    file = write_run_file(config)
    command = [sys.executable, "-m", "megahp", "train", str(file), "--ranks", str(ranks), "--resume", "auto"]
    code = subprocess.call(command, stdout=said, env=os.environ | environment, preexec_fn=die_with_parent)
    return 128 - code if code < 0 else code


def write_run_file(config: Config) -> Path:
    """These settings as a run file, beside their run directory."""
    file = Path(f"{config.directory}.toml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config_to_toml(config), encoding="utf-8")
    return file


def is_done(directory: Path) -> bool:
    """Whether nothing is left to train."""
    return is_finished(directory) or has_diverged(directory)


def is_finished(directory: Path) -> bool:
    """Whether the run took all of its steps."""
    there = (directory / "events.jsonl").exists()
    return there and any(event["event"] == "finished" for event in newest_events(directory))


def has_diverged(directory: Path) -> bool:
    """Whether the run gave up: after so many steps in a row were skipped, or with a weight that is not finite."""
    if not (directory / "events.jsonl").exists():
        return False
    newest = list(itertools.islice(newest_events(directory), MOST_SKIPPED))
    if newest and newest[0]["event"] == "broken":
        return True
    skipped = [event["step"] for event in newest if event["event"] == "skipped"]
    return len(skipped) == MOST_SKIPPED and skipped[0] - skipped[-1] == MOST_SKIPPED - 1
