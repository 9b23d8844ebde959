"""Training through the real command, with streams that fail."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from corpus import write_corpus
from train.test_run import RUN

from megahp import checkpoint
from megahp.log.streams import TolerantStream

# what stands behind the command in a shell
STREAMS = {
    "full": "> /dev/full 2>&1",
    "gone": "2>&1 | head -1",
    "closed": ">&- 2>&-",
    "stderr closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_corpus(folder / "corpus")
    (folder / "run.toml").write_text(RUN)
    return folder


def train(folder: Path, name: str, words: str = "", behind: str = "", **environment: str) -> tuple[int, str]:
    command = f"{sys.executable} -m megahp train run.toml 'log.name={name}' train.steps=3 {words} {behind}"
    command += "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **environment}, capture_output=True, timeout=120
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize("kind", STREAMS)
def test_it_trains_on_and_saves(folder: Path, kind: str) -> None:
    code, said = train(folder, kind, behind=STREAMS[kind])
    assert code == 0, said
    (saved,) = checkpoint.complete(folder / "runs" / kind / "checkpoints")
    assert saved.name == "step-00000003"


def test_names_that_the_terminal_cannot_show(folder: Path) -> None:
    code, said = train(folder, "größe", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert code == 0 and "report: " in said, said


def test_a_log_without_steps_ends_no_good_run(folder: Path) -> None:
    code, said = train(folder, "silent", "log.every=100 train.validation_samples=0 train.validate_every=0")
    assert code == 0 and "no report: " in said and "holds no step yet" in said, said


def test_what_was_written_before_a_failure_stays(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        stream = TolerantStream(file)
        print("one", file=stream)
        full = mock.Mock(side_effect=[OSError(errno.ENOSPC, "full"), None])
        with mock.patch.object(stream, "_stream", mock.Mock(write=full)):
            stream.write("a line while the disk is full")
            stream.write("one that comes")
        assert full.call_count == 2
        file.close()
        print("two", file=stream)
        print("three", file=stream, flush=True)
    assert (tmp_path / "file").read_text() == "one\n"
