"""Copies elsewhere, through real fsspec file systems: in memory, and file:// with faults put into it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from checkpoint import writer
from corpus import write_corpus
from fsspec.implementations.local import LocalFileSystem
from train.test_run import RUN, numbers
from unprivileged import megahp_alone

from megahp import checkpoint
from megahp.checkpoint.inspect import differences
from megahp.checkpoint.remote import Remote
from megahp.cli import main
from megahp.config import CheckpointConfig
from megahp.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket/runs/x"
    fsspec.filesystem("memory").store.clear()


class Flaky(LocalFileSystem):
    """file://, until so many files are written; then nothing can be, as when the network is gone."""

    protocol = ("flaky",)
    left = 10**9

    def put_file(self, *arguments: Any, **options: Any) -> None:
        if Flaky.left == 0:
            raise RuntimeError("the line is dead")  # as many libraries do: no OSError
        Flaky.left -= 1
        super().put_file(*arguments, **options)


fsspec.register_implementation("flaky", Flaky)


def tensors(step: int) -> dict[str, torch.Tensor]:
    return writer.untrained() | {"weight": torch.full((7, 5), float(step))}


def save(folder: Path, step: int, keep: CheckpointConfig) -> None:
    store = checkpoint.Store(folder, keep)
    store.begin(step, tensors(step), {"validation_loss": 10.0 - step if step < 3 else 10.0})
    store.wait()


def steps(folder: Path | Remote) -> list[int]:
    return [int(each.name.removeprefix("step-")) for each in checkpoint.complete(folder)]


def holds(location: Path | Remote, step: int) -> bool:
    found = {name: torch.zeros_like(value) for name, value in tensors(step).items()}
    checkpoint.load(location, found)
    return all(torch.equal(value, tensors(step)[name]) for name, value in found.items())


def test_what_stays_is_copied_and_loads_from_there(tmp_path: Path, memory: str) -> None:
    there = Remote(memory) / "checkpoints"
    for step in range(1, 6):
        save(tmp_path, step, CheckpointConfig(keep=2, keep_best=True, remote=memory))
        assert steps(there) == steps(tmp_path)
    assert steps(there) == [2, 4, 5]
    for each in checkpoint.complete(there):
        assert checkpoint.problems(each) == [] and holds(each, int(each.name[-1]))
    assert checkpoint.find(Remote(memory)) == there / "step-00000005"
    shutil.rmtree(tmp_path / "step-00000005")  # gone back, and on again, to another step 5
    store = checkpoint.Store(tmp_path, CheckpointConfig(keep=2, remote=memory))
    store.begin(5, tensors(7), {})
    store.wait()
    assert holds(there / "step-00000005", 7)


def test_copies_elsewhere_outlive_the_folder_and_keep_their_own_count(tmp_path: Path, memory: str) -> None:
    for step in (1, 2):
        save(tmp_path / "one", step, CheckpointConfig(keep=2, remote=memory))
    save(tmp_path / "other", 3, CheckpointConfig(keep=2, remote=memory))
    assert steps(Remote(memory) / "checkpoints") == [2, 3]
    newest_first = checkpoint.candidates(tmp_path / "one", memory)
    assert [each.name[-1] for each in newest_first] == ["3", "2", "2", "1"]
    assert [isinstance(each, Path) for each in newest_first] == [False, True, False, True]


@pytest.mark.parametrize("files", range(4))
def test_a_copy_that_is_cut_short_is_none_and_is_made_the_next_time(tmp_path: Path, files: int) -> None:
    there = f"flaky://{tmp_path}/there"
    keep = CheckpointConfig(keep=3, remote=there)
    save(tmp_path / "here", 1, keep)
    Flaky.left = files
    with pytest.raises(UserError, match="step-00000002 is whole, but not copied.*the line is dead"):
        save(tmp_path / "here", 2, keep)
    Flaky.left = 10**9
    assert len(list((tmp_path / "there/checkpoints/step-00000002").glob("*"))) == files
    assert steps(tmp_path / "here") == [1, 2] and holds(checkpoint.path(tmp_path / "here", 2), 2)
    assert steps(Remote(there) / "checkpoints") == [1]
    save(tmp_path / "here", 3, keep)
    copies = checkpoint.complete(Remote(there) / "checkpoints")
    assert [holds(each, step) for step, each in enumerate(copies, 1)] == [True] * 3


def test_a_copy_half_dropped_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = f"flaky://{tmp_path}/there"
    save(tmp_path / "here", 1, CheckpointConfig(remote=there))
    (copy,) = checkpoint.complete(Remote(there) / "checkpoints")
    removed: list[str] = []

    def fail_second(self: Flaky, path: str, **options: Any) -> None:
        if removed:
            raise RuntimeError("the line is dead")
        removed.append(path)
        os.remove(path)

    monkeypatch.setattr(Flaky, "rm", fail_second)
    with pytest.raises(OSError, match="the line is dead"):
        checkpoint.remove(copy)
    assert checkpoint.complete(Remote(there) / "checkpoints") == []


def test_any_flipped_bit_there_is_refused(tmp_path: Path) -> None:
    there = f"file://{tmp_path}/there"
    save(tmp_path / "here", 1, CheckpointConfig(remote=there))
    (copy,) = checkpoint.complete(Remote(there) / "checkpoints")
    draw = random.Random(1)
    for file in (tmp_path / "there/checkpoints/step-00000001").iterdir():
        for _ in range(10):
            sound = file.read_bytes()
            broken = bytearray(sound)
            broken[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
            file.write_bytes(broken)
            with pytest.raises(checkpoint.DamagedError, match=f"file://{tmp_path}/there/checkpoints/step-00000001"):
                holds(copy, 1)
            file.write_bytes(sound)
    assert holds(copy, 1)


def test_what_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url, told in (
        ("nowhere://x", "nowhere://x.*Protocol not known"),
        ("runs/x", "checkpoint.remote = 'runs/x' is not a URL.*file:///"),
        (f"file://{tmp_path}/file/x", f"file://{tmp_path}/file/x/.* cannot be read .*Not a directory.*without checkpo"),
    ):
        with pytest.raises(UserError, match=told):
            checkpoint.candidates(tmp_path, url)


def test_commands_take_urls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of checkpoints that training wrote; and a run whose directory is lost goes on from them to the undisturbed run's
    numbers."""
    write_corpus(tmp_path / "corpus", 0.05)
    (tmp_path / "run.toml").write_text(RUN)
    there = f"file://{tmp_path}/bucket/run"

    def train(name: str, *words: str) -> None:
        command = [sys.executable, "-m", "megahp", "train", "run.toml", f"log.name={name}", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    train("undisturbed")
    train("lost", "train.steps=12", f"checkpoint.remote={there}")
    shutil.rmtree(tmp_path / "runs/lost")
    train("lost", "--resume", "auto", f"checkpoint.remote={there}")
    assert numbers(tmp_path, "lost") == numbers(tmp_path, "undisturbed")[12:]
    events = [json.loads(line) for line in (tmp_path / "runs/lost/events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "resumed" and f"from {there}/checkpoints/step-00000012" in events[0]["reason"]

    monkeypatch.chdir(tmp_path)
    refused = megahp_alone(tmp_path, f"train run.toml log.name=another checkpoint.remote={there}")
    assert (
        refused.code == 2
        and f"{there}/checkpoints/step-00000040 already exists; pass --resume auto to continue" in refused.err
    )
    found = list(differences(*(checkpoint.find(each) for each in (tmp_path / "runs/undisturbed", Remote(there)))))
    assert [line for line in found if not line.startswith(("log.name", "checkpoint.remote"))] == []
    assert main(["checkpoint", "ls", there]) == 0
    assert main(["checkpoint", "verify", there]) == 0
    assert main(["checkpoint", "prune", there, "--keep", "1"]) == 0
    assert len(checkpoint.complete(Remote(there) / "checkpoints")) == 1
    assert f"{there}/checkpoints/step-00000035 deleted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["checkpoint", "verify", "nowhere://x"])
    assert "nowhere://x cannot be opened" in capsys.readouterr().err
