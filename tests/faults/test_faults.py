"""Faults that last, and those the soak cannot hold: what is done about each, through the real command."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from corpus import write_corpus
from faults.test_soak import RUN

from megahp import checkpoint
from megahp.log.metrics import read_events

INJECT = Path(__file__).parent / "inject"
ALONE = ("parallel.dp_replicate=1", "resilience.spike_window=12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus", 0.02)
    (folder / "run.toml").write_text(RUN.replace("tokens = 9600", "tokens = 2560"))
    return folder


def start(
    folder: Path,
    name: str,
    *words: str,
    faults: tuple[dict[str, Any], ...] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """The command, on ranks for which there may be faults."""
    planned = folder / f"{name}.json"
    planned.write_text(json.dumps(faults))
    return subprocess.Popen(
        [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", *words],
        cwd=folder,
        env={**os.environ, "FAULTS": str(planned), "PYTHONPATH": f"{INJECT}:{os.getcwd()}", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(folder: Path, name: str, *words: str, **options: Any) -> tuple[int, str]:
    """Exit code, and what was said."""
    started = start(folder, name, *words, **options)
    said, _ = started.communicate(timeout=240)
    return started.returncode, said


def events(folder: Path, name: str, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "runs" / name) if event["event"] in kinds]


def test_a_slow_rank_is_named(folder: Path) -> None:
    slow = ({"kind": "slow", "rank": 1, "step": 1},)
    code, said = train(folder, "slow", "--ranks", "2", "resilience.check_every=10", faults=slow)
    assert code == 0, said
    (told,) = events(folder, "slow", "straggler")
    assert told["ranks"] == [1] and told["reason"].startswith("rank 1 works for")


def test_a_rank_that_hangs_with_the_store_is_left(folder: Path) -> None:
    """Under srun the first rank holds the store the others would ask."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    stop = ({"kind": "stop", "rank": 0, "step": 3},)
    words = ("resilience.hang_after=3.0", "checkpoint.every=0")
    first, second = (
        start(folder, "store", *words, faults=stop, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    )
    said, _ = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 76 and "no answer from the rank that holds the ranks' store; rank 1 in all_" in said
    marked = (folder / "store.json.0").stat().st_mtime
    crash = (folder / "runs/store/crashes/rank-00001.txt").stat().st_mtime
    assert crash - marked < 3 + 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here, which takes root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_nothing_but_the_end(folder: Path, small_disk: Path) -> None:
    """Training goes on without the checkpoints that cannot be written, says so, and keeps the one that was."""
    words = (*ALONE, f"log.root={small_disk}", "train.steps=12", "checkpoint.every=4", "checkpoint.keep=9")
    code, said = train(folder, "small", *words, "train.steps=4")
    assert code == 0, said
    (good,) = checkpoint.complete(small_disk / "small/checkpoints")
    fill = ({"kind": "fill", "rank": 0, "step": 6, "folder": str(small_disk)},)
    code, said = train(folder, "small", *words, "--ranks", "1", "--restarts", "0", "--resume", "auto", faults=fill)
    assert code == 2 and "make room" in said.splitlines()[-1], said
    assert "cannot be written (No space left on device); lines are lost" in said and "Traceback" not in said
    assert "unsaved: checkpoint" in said
    assert checkpoint.complete(small_disk / "small/checkpoints") == [good] and not checkpoint.problems(good)
    (small_disk / "filler").unlink()
    code, said = train(folder, "small", *words, "--resume", "auto")
    assert code == 0, said


@pytest.mark.parametrize(
    "words", [(*ALONE, "--restarts", "3"), ("--ranks", "2", "--restarts", "-1"), ("--restarts", "x")], ids=" ".join
)
def test_restarts_that_make_no_sense(folder: Path, words: tuple[str, ...]) -> None:
    code, said = train(folder, "none", *words)
    assert code == 2 and "--restarts" in said.splitlines()[-1]
    assert not (folder / "runs/none").exists()
