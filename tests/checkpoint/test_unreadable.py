"""What cannot be read is neither absent nor damaged: told in one line, nothing begun over, nothing removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from corpus import write_corpus
from distributed import runs
from train.test_run import RUN
from unprivileged import megahp, megahp_alone

from megahp import checkpoint
from megahp.checkpoint import UnreadableError
from megahp.checkpoint.store import superseded
from megahp.config import CheckpointConfig
from megahp.log.metrics import read_events, read_metrics
from megahp.log.replay import replay

SHORT = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=9")
RESUME = f"train run.toml log.name=run --resume auto {' '.join(SHORT)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unreadable")
    write_corpus(folder / "corpus")
    (folder / "run.toml").write_text(RUN)
    runs.train(folder, "run", *SHORT)
    return folder


@contextmanager
def closed(path: Path) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(mode)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


NEWEST = "checkpoints/step-00000003"
FILES = ("shard-00000.safetensors", "index.json", "state.json", "manifest.json")


@pytest.mark.parametrize(
    "location", ["checkpoints", NEWEST, *(f"{NEWEST}/{name}" for name in FILES if name != "index.json")]
)
def test_it_is_told_in_one_line_and_nothing_changes(folder: Path, location: str) -> None:
    """By every command that looks for a checkpoint; the one before does not serve in its stead."""
    run = folder / "runs/run"
    before = everything(run)
    commands = ["sample runs/run", "checkpoint verify runs/run", f"checkpoint diff runs/run runs/run/{NEWEST}"]
    with closed(run / location):
        found = [megahp_alone(folder, RESUME), *megahp(folder, *commands, "train run.toml log.name=run")]
    for done in found[:-1]:
        assert done.code == 2 and done.err.count("\n") == 1, done
        assert "cannot be read (Permission denied)" in done.err, done
        assert "damaged" not in done.err and "remove" not in done.err, done
    assert found[-1].code == 2
    assert everything(run) == before


def test_of_older_checkpoints_none_is_dropped_that_may_be_the_best(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder / "runs/run/checkpoints", copy)
    first, second, newest = checkpoint.complete(copy)
    assert superseded(copy, newest, CheckpointConfig(keep=1)) == [first, second]
    with failing(second / "state.json", errno.EIO):
        assert superseded(copy, newest, CheckpointConfig(keep=1, keep_best=True)) == [first]


@contextmanager
def failing(path: Path, number: int) -> Iterator[None]:
    """Reading this file fails with an error of the system's."""
    read, opened = Path.read_bytes, Path.open

    def refuse(self: Path) -> None:
        if self == path:
            raise OSError(number, os.strerror(number), str(path))

    def read_bytes(self: Path) -> bytes:
        refuse(self)
        return read(self)

    def open_file(self: Path, *words: Any, **more: Any) -> Any:
        refuse(self)
        return opened(self, *words, **more)

    with mock.patch.object(Path, "read_bytes", read_bytes), mock.patch.object(Path, "open", open_file):
        yield


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", FILES)
def test_a_disk_that_fails_damages_nothing(folder: Path, name: str, number: int) -> None:
    path = folder / "runs/run" / NEWEST
    with failing(path / name, number), pytest.raises(UnreadableError, match=os.strerror(number)) as raised:
        checkpoint.problems(path)
    assert raised.value.may_pass == (number != errno.EACCES)  # then training is started again
    assert checkpoint.problems(path) == []


def test_files_follow_the_umask(folder: Path) -> None:
    """So that a colleague of the group reads what the group may read."""
    words = [sys.executable, "-m", "megahp", "train", "run.toml", "log.name=shared", "train.steps=1"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, umask=0o027)
    assert done.returncode == 0, done.stderr
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder / "runs/shared").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}


def test_a_log_without_checkpoints_is_kept_beside_the_new_one(folder: Path) -> None:
    """Each time that a run begins again; and whoever requires a checkpoint begins nothing."""
    runs.train(folder, "gone", *SHORT)
    run = folder / "runs/gone"
    logs = []
    for number in (1, 2):
        logs.append((run / "metrics.jsonl").read_bytes())
        shutil.rmtree(run / "checkpoints")
        before = everything(run)
        (done,) = megahp(folder, "train run.toml log.name=gone --resume required train.steps=3")
        assert done.code == 2 and "holds no checkpoint to resume from" in done.err and everything(run) == before
        runs.train(folder, "gone", "--resume", "auto", *SHORT)
        assert (run / f"metrics-{number}.jsonl").read_bytes() == logs[-1]
        assert [record["step"] for record in read_metrics(run)] == [1, 2, 3]
        starts = [event["reason"] for event in read_events(run) if event["event"] == "started"]
        assert len(starts) == number + 1 and f"is kept in metrics-{number}.jsonl" in starts[-1]
        assert replay(run).differences == []
    assert json.loads((run / "metrics-1.jsonl").read_text().splitlines()[0])["step"] == 1
    runs.train(folder, "gone", "--resume", "required", *SHORT)
