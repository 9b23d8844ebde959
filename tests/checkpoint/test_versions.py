"""Checkpoints of older versions, as they were written then, serve today.

version3/ is the checkpoint after two steps of `write_run`'s run; WHOLE are that run's losses when nothing stopped it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megahp import checkpoint
from megahp.checkpoint import store
from megahp.checkpoint.store import write_manifest
from megahp.data.indexed import IndexedWriter
from megahp.errors import UserError

WRITTEN = {int(each.name.removeprefix("version")): each for each in Path(__file__).parent.glob("version*")}
WHOLE = [8.778261184692383, 6.195285797119141, 5.649157524108887, 4.904527187347412]
RUN = """
[model]
layers = 1
width = 4
heads = 1
mlp_width = 8
tied_embeddings = true
[data]
train = ["corpus"]
sequence_length = 32
validation_fraction = 0.1
[batch]
global_batch = 4
micro_batch = 4
[train]
tokens = 512
validation_samples = 4
[log]
tensorboard = false
"""


def write_run(folder: Path) -> None:
    with IndexedWriter(str(folder / "corpus"), 257) as writer:
        for number in range(40):
            writer.add_document(list(f"some text, number {number}, again and again ".encode() * 8))
    (folder / "run.toml").write_text(RUN)


def test_there_is_a_checkpoint_of_every_older_version() -> None:
    assert WRITTEN.keys() >= set(range(store.OLDEST, store.VERSION)), "keep one that the version before wrote"


@pytest.mark.parametrize("version", WRITTEN)
def test_a_run_of_an_older_version_goes_on(tmp_path: Path, version: int) -> None:
    write_run(tmp_path)
    shutil.copytree(WRITTEN[version], tmp_path / "runs/run/checkpoints/step-00000002")
    command = [sys.executable, "-m", "megahp", "train", "run.toml", "--resume", "auto"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(WHOLE[2:], rel=1e-5)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two versions after version 3 that are not the real ones: one adds a key, the other needs it."""
    name = lambda state: {**state, "skips": state["skipped"]}  # noqa: E731
    count = lambda state: {**store._with_spikes(state), "taken": state["updates"] + state["skips"]}  # noqa: E731
    monkeypatch.setattr(store, "OLDEST", 3)
    monkeypatch.setattr(store, "MIGRATIONS", (name, count))
    monkeypatch.setattr(store, "VERSION", 5)


def test_each_migration_is_applied_once_and_nothing_is_rewritten(tmp_path: Path, later: None) -> None:
    shutil.copytree(WRITTEN[3], old := tmp_path / "old")
    assert {"skips": 0, "taken": 2}.items() <= checkpoint.read_state(old).items()
    assert (old / "state.json").read_bytes() == (WRITTEN[3] / "state.json").read_bytes()
    assert checkpoint.problems(old) == []

    state = json.loads((old / "state.json").read_text()) | {"version": 4, "skips": 40, "skipped": 0}
    (old / "state.json").write_text(json.dumps(state))
    reseal(old, 4)
    assert {"skips": 40, "taken": 42}.items() <= checkpoint.read_state(old).items()


@pytest.mark.parametrize("version", [2, store.VERSION + 1])
def test_another_version_is_refused_and_nothing_older_taken_in_its_place(tmp_path: Path, version: int) -> None:
    for step in (1, 2):
        shutil.copytree(WRITTEN[3], tmp_path / f"step-0000000{step}")
    reseal(tmp_path / "step-00000002", version)
    for read in (checkpoint.read_state, checkpoint.problems, lambda path: checkpoint.latest(path.parent)):
        with pytest.raises(UserError, match=f"step-00000002 is of version {version} and this megahp reads 3 to"):
            read(tmp_path / "step-00000002")


def reseal(path: Path, version: int) -> None:
    """As a megahp of that version seals what is there."""
    (path / "manifest.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "VERSION", version)
        write_manifest(path)
