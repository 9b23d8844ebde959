"""The store: whatever happens to a file, or to the process that writes one, what loads is what was saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint import writer
from distributed import world
from safetensors.torch import load_file, save_file

from megahp import checkpoint, cli
from megahp.checkpoint import shards
from megahp.checkpoint.store import superseded, write_manifest
from megahp.config import CheckpointConfig
from megahp.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(step: int) -> dict[str, torch.Tensor]:
    """Every type that is saved, shapes without elements and without dimensions too."""
    return {
        "model.matrix": torch.full((7, 5), float(step)),
        "model.half": torch.full((6,), step, dtype=torch.bfloat16),
        "model.scalar": torch.tensor(step, dtype=torch.float64),
        "mask": torch.arange(9) % (step + 2) == 0,
        "empty": torch.empty(0, 3),
    }


def save(folder: Path, step: int, keep: CheckpointConfig | None = None, **state: Any) -> Path:
    store = checkpoint.Store(folder, keep or CheckpointConfig(keep=100))
    store.begin(step, tensors(step), state)
    store.wait()
    return checkpoint.path(folder, step)


def loaded(path: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(value) for name, value in tensors(1).items()}
    checkpoint.load(path, found)
    return found


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert checkpoint.problems(path) == []
    assert all(torch.equal(value, tensors(3)[name]) for name, value in loaded(path).items())


@pytest.mark.parametrize(
    ("name", "needed", "why"),
    [
        ("model.matrix", torch.zeros(5, 7), "model.matrix must be torch.float32 [5, 7], and is torch.float32 [7, 5]"),
        ("model.half", torch.zeros(6), "model.half must be torch.float32 [6], and is torch.bfloat16 [6]"),
        ("model.other", torch.zeros(2), "model.other must be torch.float32 [2], and is not in it"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_none_is_touched(
    tmp_path: Path, name: str, needed: torch.Tensor, why: str
) -> None:
    path, scalar = save(tmp_path, 3), torch.zeros((), dtype=torch.float64)
    with pytest.raises(UserError, match=re.escape(f"cannot be loaded ({why})")) as raised:
        checkpoint.load(path, {"model.scalar": scalar, name: needed})
    assert not isinstance(raised.value, checkpoint.DamagedError) and not scalar


def test_the_shards_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    (shard,) = save(tmp_path, 3).glob("*.safetensors")
    assert all(torch.equal(value, tensors(3)[name]) for name, value in load_file(shard).items())


def test_a_file_is_byte_for_byte_the_librarys(tmp_path: Path) -> None:
    """Of every type that is saved, in the library's own order, whatever the names and shapes."""
    types = enumerate(shards.DTYPES.values())
    named = {f'{9 - number}."é\\': torch.arange(3 * number).to(dtype).reshape(3, number) for number, dtype in types}
    named |= {name: value.clone() for name, value in tensors(5).items()}
    checkpoint.write(path := tmp_path / "step-00000001", named.items(), {}, 2**20)
    save_file(named, tmp_path / "theirs")
    (shard,) = path.glob("*.safetensors")
    assert shard.read_bytes() == (tmp_path / "theirs").read_bytes() and checkpoint.problems(path) == []


FILES = ("shard-00000.safetensors", "index.json", "state.json", "manifest.json")


def syncs(monkeypatch: pytest.MonkeyPatch, before: Callable[[Path], None]) -> None:
    """Call before(path) whenever a file or folder is about to be synced."""
    sync = os.fsync

    def told(fd: int) -> None:
        before(Path(os.readlink(f"/proc/self/fd/{fd}")))
        sync(fd)

    monkeypatch.setattr(os, "fsync", told)


@pytest.mark.parametrize("name", FILES)
def test_a_bit_that_flips_on_the_way_to_the_disk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The manifest lists what was in memory, not what the disk gives back."""

    def flip(path: Path) -> None:
        if path.name == name:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)

    syncs(monkeypatch, flip)
    path = save(tmp_path, 1)
    assert checkpoint.problems(path) == [f"{name} is not what was written"] or name == "manifest.json"
    with pytest.raises(checkpoint.DamagedError, match=name):
        loaded(path)


def test_all_is_synced_before_a_checkpoint_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name before the save ends."""
    done: list[str] = []
    whole: dict[str, int] = {}
    rename = Path.rename

    def synced(path: Path) -> None:
        done.append(path.name)
        whole[path.name] = path.stat().st_size

    def renamed(path: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(path, target)

    syncs(monkeypatch, synced)
    monkeypatch.setattr(Path, "rename", renamed)
    path = save(tmp_path, 1)
    at = done.index("renamed")
    assert sorted(done[: at - 1]) == sorted(FILES) and done[at - 1] == ".partial-00000001"
    assert done[at + 1 :] == [tmp_path.name]
    assert all(whole[name] == (path / name).stat().st_size for name in FILES)  # nothing is written after its sync


LARGE = {"small": torch.arange(1.0, 300), "most": torch.arange(1.0, 1000).bfloat16(), "none": torch.empty(0)}


def test_loading_fills_a_tensors_own_memory_whatever_its_strides(tmp_path: Path) -> None:
    """Where a chunk is all of a contiguous tensor, and by a copy where it is not."""
    values = torch.arange(12.0).reshape(3, 4)
    checkpoint.write(path := tmp_path / "step-00000001", {"a": values, "b": values + 1}.items(), {}, 2**20)
    found = {"a": torch.zeros(3, 4), "b": torch.zeros(4, 3).T}
    memory = found["a"].data_ptr()
    checkpoint.load(path, found)
    assert torch.equal(found["a"], values) and torch.equal(found["b"], values + 1)
    assert found["a"].data_ptr() == memory and not found["b"].is_contiguous()


def test_a_file_of_any_length_has_its_digest(tmp_path: Path) -> None:
    for length in (0, 1, shards.BLOCK - 1, shards.BLOCK, 3 * shards.BLOCK + 5):
        (path := tmp_path / "file").write_bytes(data := random.Random(length).randbytes(length))
        assert shards.digest(path) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("needed", [["small"], ["small", "most"]], ids=["a part", "all"])
def test_both_sums_are_compared(tmp_path: Path, needed: list[str]) -> None:
    """A chunk that differs from its own sum, in a file that is as the manifest lists it: as when it was written by a
    megahp that listed what the disk gave back."""
    checkpoint.write(path := tmp_path / "step-00000001", LARGE.items(), {}, 2**20)
    begin = json.loads((path / "index.json").read_text())["tensors"]["small"]["chunks"][0]["begin"]
    content = bytearray((path / "shard-00000.safetensors").read_bytes())
    content[begin] ^= 1
    (path / "shard-00000.safetensors").write_bytes(content)
    (path / "manifest.json").unlink()
    write_manifest(path)
    assert checkpoint.problems(path) == []
    found = {name: torch.zeros_like(LARGE[name]) for name in needed}
    with pytest.raises(checkpoint.DamagedError, match=f"the part of small at byte {begin} is not what was written"):
        checkpoint.load(path, found)


def test_saving_in_the_background_copies_first(tmp_path: Path) -> None:
    store, now, state = checkpoint.Store(tmp_path, CheckpointConfig()), tensors(1), {"averages": {"noise": 1.0}}
    store.begin(1, now, state)
    state["averages"]["noise"] = 0.0
    for value in now.values():
        value.zero_()
    store.wait()
    path = checkpoint.path(tmp_path, 1)
    assert torch.equal(loaded(path)["model.matrix"], torch.ones(7, 5))
    assert json.loads((path / "state.json").read_text())["averages"] == {"noise": 1.0}


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    """By `verify`, and by loading, which leaves the tensors alone; in every file, its first and last bit among them."""
    path = save(tmp_path, 3)
    draw = random.Random(1)
    sizes = {file: 8 * file.stat().st_size for file in path.iterdir()}
    places = [
        (file, bit) for file, bits in sizes.items() for bit in (0, bits - 1, *draw.sample(range(bits), min(bits, 360)))
    ]
    assert len(places) > 1000
    for file, bit in places:
        sound = file.read_bytes()
        broken = bytearray(sound)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        assert checkpoint.problems(path), (file.name, bit)
        found = {name: torch.zeros_like(value) for name, value in tensors(1).items()}
        with pytest.raises(checkpoint.DamagedError, match="step-00000003"):
            checkpoint.load(path, found)
        assert not any(value.any() for value in found.values())
        file.write_bytes(sound)
    assert checkpoint.problems(path) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "another's"])
def test_a_damaged_file_is_named_and_the_one_before_serves(tmp_path: Path, name: str, damage: str) -> None:
    before, path = (save(tmp_path, step, number=step) for step in (1, 2))
    file = path / name
    if damage == "missing":
        file.unlink()
    elif damage == "another's":
        shutil.copy(before / name, file)
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else file.read_bytes() + b"\0")
    wrong = checkpoint.problems(path)
    assert wrong and (name in wrong[0] or name == "manifest.json")
    with pytest.raises(checkpoint.DamagedError, match="step-00000002"):
        loaded(path)
    if name.endswith(".json"):  # what a start looks at before it reads a tensor
        assert checkpoint.latest(tmp_path) == before


def test_no_checkpoint_is_whole(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match="so are all before it"):
        checkpoint.latest(tmp_path)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "index.json", "shard-00000.safetensors", ".metadata"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_planted_pickle_is_never_executed(tmp_path: Path, name: str, sealed: bool) -> None:
    path, canary = save(tmp_path, 1), tmp_path / "canary"
    (path / name).write_bytes(pickle.dumps(Canary(canary)))
    if sealed and name != "manifest.json":  # by somebody who knows the format
        (path / "manifest.json").unlink()
        write_manifest(path)
    for read in (loaded, checkpoint.read_state):
        with contextlib.suppress(UserError):
            read(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # or this would test nothing
    assert canary.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../1.safetensors"},
        {"offsets": [1, 0]},
        {"offsets": [-1, 0]},
        {"shape": [6, 5], "bytes": 120},
        {"bytes": 1},
        {"begin": 4},
        {"begin": 10**30},
        {"unknown": 1},
    ],
    ids=str,
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Even when the manifest agrees with it."""
    path = save(tmp_path, 1)
    index = json.loads((path / "index.json").read_text())
    index["tensors"]["model.matrix"]["chunks"][0] |= change
    (path / "index.json").write_text(json.dumps(index))
    (path / "manifest.json").unlink()
    write_manifest(path)
    with pytest.raises(UserError, match=r"index\.json|is not what was written"):
        loaded(path)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (CheckpointConfig(keep=2), [5, 6]),
        (CheckpointConfig(keep=1, keep_every=3), [3, 6]),
        (CheckpointConfig(keep=1, keep_best=True), [2, 6]),
    ],
)
def test_what_stays(tmp_path: Path, keep: CheckpointConfig, kept: list[int]) -> None:
    for step, loss in enumerate([5.0, 1.0, 2.0, None, 3.0, 4.0], 1):
        save(tmp_path, step, validation_loss=loss)
    dropped = superseded(tmp_path, checkpoint.path(tmp_path, 6), keep)
    assert [step for step in range(1, 7) if checkpoint.path(tmp_path, step) not in dropped] == kept


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    """F12. The first one too, with which every comparison is false."""
    for step, loss in enumerate([float("nan"), float("-inf"), 3.0, 4.0, float("nan")], 1):
        save(tmp_path, step, validation_loss=loss)
    dropped = superseded(tmp_path, checkpoint.path(tmp_path, 5), CheckpointConfig(keep=1, keep_best=True))
    assert [step for step in range(1, 6) if checkpoint.path(tmp_path, step) not in dropped] == [3, 5]


def test_pruning_to_the_best_of_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F12."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step)
    assert cli.main(["checkpoint", "prune", str(tmp_path), "--keep", "1", "--keep-best"]) == 2
    assert "has a validation loss" in capsys.readouterr().err
    assert len(checkpoint.complete(tmp_path / "checkpoints")) == 2


def test_room_is_looked_for_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="100 are free.*make room"):
            save(tmp_path, 2)
    assert checkpoint.complete(tmp_path) == [before] and checkpoint.problems(before) == []
    assert checkpoint.problems(save(tmp_path, 3)) == []  # and the unfinished one is swept away
    assert not list(tmp_path.glob(".partial*"))


def replicated_and_split(folder: str) -> tuple[int, bool]:
    """Of two ranks' equal tensors one is written; the parts of a split one come together on another layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, whole = init_device_mesh("cpu", (2,)), torch.arange(1000.0).reshape(100, 10)
    laid_out = {"rows": distribute_tensor(whole, mesh, [Shard(0)]), "copied": whole.clone()}
    store = checkpoint.Store(Path(folder), CheckpointConfig())
    store.begin(1, laid_out, {})
    store.wait()
    empty = torch.zeros_like(whole)
    found = {"rows": distribute_tensor(empty, mesh, [Shard(1)]), "copied": distribute_tensor(empty, mesh, [Shard(0)])}
    checkpoint.load(checkpoint.path(Path(folder), 1), found)
    same = all(torch.equal(value.redistribute(mesh, [Replicate()]).to_local(), whole) for value in found.values())
    return sum(file.stat().st_size for file in Path(folder).glob("step-*/*.safetensors")), same


def test_two_ranks_write_each_value_once(tmp_path: Path) -> None:
    for size, same in world.run(2, replicated_and_split, str(tmp_path)):
        assert same and size < 2 * 4000 + 1000


def assert_undisturbed(path: Path, history: list[dict[str, torch.Tensor]]) -> None:
    """The checkpoint is whole, and bit for bit what a training that nothing interrupts has there; `history` remembers
    that one's steps."""
    for step in range(len(history), int(path.name.removeprefix("step-")) + 1):
        history.append(writer.advance(history[-1], step))
    expected = history[int(path.name.removeprefix("step-"))]
    found = {name: torch.full_like(value, -1) for name, value in expected.items()}
    assert checkpoint.problems(path) == []
    checkpoint.load(path, found)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def kill_while_saving(folder: Path, times: int) -> None:
    """At a random moment of one of the first saves, at least so many times, and until a quarter of them was cut short:
    how much of a step is saving, depends on the disk. The next process goes on from what is there."""
    draw, history, cut_short, kills = random.Random(2), [writer.untrained()], 0, 0
    while kills < times or cut_short < times / 4:
        told, tell = Pipe(duplex=False)
        with writer.started(str(folder), 10**9, tell) as process:
            tell.close()
            moments = {told.recv(): time.monotonic() for _ in range(draw.randint(2, 4))}
            begun, (*_, before, last) = max(moments), moments.values()
            time.sleep(draw.random() * (last - before))
            process.kill()
        saved = checkpoint.complete(folder)
        assert int(saved[-1].name.removeprefix("step-")) >= begun - 1  # one interval lost at most
        assert len(saved) <= writer.KEEP + 1
        for path in saved:
            assert_undisturbed(path, history)
        cut_short, kills = cut_short + any(folder.glob(".partial-*")), kills + 1
        assert kills <= 20 * times, f"only {cut_short} saves were cut short"
    last = len(history) + 1
    with writer.started(str(folder), last) as process:
        process.join()
    assert_undisturbed(checkpoint.path(folder, last), history)


def test_a_writer_killed_at_any_moment_loses_and_spoils_nothing(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 10)


@pytest.mark.slow
def test_a_writer_killed_two_hundred_times(tmp_path: Path) -> None:
    kill_while_saving(tmp_path, 200)


def test_a_writer_killed_before_each_operation_on_a_file(tmp_path: Path) -> None:
    """Of a save that drops an old checkpoint, too, one operation after another."""
    history, kills, killed, begin = [writer.untrained()], 0, True, tmp_path / "begin"
    with writer.started(str(begin), 2) as process:
        process.join()
    while killed:
        shutil.copytree(begin, folder := tmp_path / str(kills))
        with writer.started(str(folder), 3, None, kills) as process:
            process.join()
        killed = process.exitcode != 0
        kills += killed
        for path in checkpoint.complete(folder):
            assert_undisturbed(path, history)
        assert checkpoint.latest(folder) in (checkpoint.path(folder, 2), checkpoint.path(folder, 3))
        with writer.started(str(folder), 4) as process:
            process.join()
        assert sorted(folder.iterdir()) == [checkpoint.path(folder, 3), checkpoint.path(folder, 4)]  # nothing else
        assert_undisturbed(checkpoint.path(folder, 4), history)
    assert kills > 15
