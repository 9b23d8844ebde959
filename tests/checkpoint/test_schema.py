"""Checkpoints whose seal agrees with what somebody has put in: refused by name before anything of them is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megahp import checkpoint
from megahp.checkpoint import schema
from megahp.checkpoint.shards import Tensors
from megahp.checkpoint.store import _sealed, write, write_manifest
from megahp.errors import UserError

WRITTEN = Path(__file__).parent / "version3"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    if dist.is_initialized():  # by a command that another test has called
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resealed(path: Path, name: str, change: Change) -> Path:
    """The checkpoint with one of its JSON files changed, and a manifest that agrees."""
    found = json.loads((path / name).read_text())
    change(found)
    (path / name).write_text(json.dumps(found))
    (path / "manifest.json").unlink()
    write_manifest(path)
    return path


def with_files(path: Path, change: Change) -> Path:
    """The checkpoint with a changed list of files, sealed."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["files"])
    (path / "manifest.json").write_text(_sealed(manifest["files"], manifest["version"]))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "step-00000002"))


def section(name: str, **values: Any) -> Change:
    return lambda state: state[name].update(values)


STATES: dict[str, Change] = {
    "progress.step": section("progress", step=-1),
    "progress.tokens": section("progress", tokens="256"),
    "progress.more": section("progress", more=1),
    "batch_plan.batch": section("batch_plan", batch=0),
    "batch_plan.since": section("batch_plan", since="soon"),
    "loss_scale.value": section("loss_scale", value=None),
    "loss_scale.steps": section("loss_scale", steps=0.5),
    "noise_scale.pooled": section("noise_scale", pooled=[1, 2]),
    "noise_scale.norms": section("noise_scale", norms={"closed": [[1.0]], "open": [0.0] * 4, "tokens": 1}),
    "data_order.begins": section("data_order", begins={"a": [1]}),
    "data_order.stage": section("data_order", stage=-1),
    "layout": lambda state: state.update(layout={"tp": -2}),
    "config": lambda state: state.update(config=[1]),
    "table": lambda state: state.update(table="completep"),
    "skipped": lambda state: state.update(skipped=True),
    "wandb_id": lambda state: state.update(wandb_id="../../x?y=1"),
    "validation_loss": lambda state: state.update(validation_loss="low"),
    "updates": lambda state: state.pop("updates"),
}


@pytest.mark.parametrize("key", STATES)
def test_a_state_of_wrong_types_is_refused_by_name(path: Path, key: str) -> None:
    resealed(path, "state.json", STATES[key])
    with pytest.raises(checkpoint.DamagedError, match=f"{key.partition('.')[0]}") as raised:
        checkpoint.read_state(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "[" * 100_000, '{"version": 1e400}', '{"version": "4"}', "\xff"])
def test_a_state_that_is_none_is_refused(path: Path, text: str) -> None:
    (path / "state.json").write_text(text, encoding="latin-1")
    (path / "manifest.json").unlink()
    write_manifest(path)
    with pytest.raises(checkpoint.DamagedError, match=r"state\.json"):
        checkpoint.read_state(path)


OUTSIDE = {"bytes": 6, "sha256": "0"}
FILES: dict[str, Change] = {
    "../../secret": lambda files: files.update({"../../secret": OUTSIDE}),
    "/etc/passwd": lambda files: files.update({"/etc/passwd": OUTSIDE}),
    "'..'": lambda files: files.update({"..": OUTSIDE}),
    "sub/file": lambda files: files.update({"sub/file": OUTSIDE}),
    "state.json": lambda files: files.pop("state.json"),
    "index.json": lambda files: files.pop("index.json"),
    "does not list": lambda files: files.clear(),
    "bytes": lambda files: files["index.json"].update(bytes="many"),
    "more": lambda files: files["index.json"].update(more=1),
    "shard-00000": lambda files: files.pop("shard-00000.safetensors"),
}


@pytest.mark.parametrize("wrong", FILES)
def test_a_manifest_that_lists_what_it_should_not_is_refused(path: Path, wrong: str) -> None:
    """And nothing that it names elsewhere is read, or would be copied."""
    with_files(path, FILES[wrong])
    found = checkpoint.problems(path)
    assert len(found) >= 1 and wrong in found[0]
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(path, {})


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    shard = path / "shard-00000.safetensors"
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    for look in (checkpoint.problems, checkpoint.read_state, lambda path: checkpoint.load(path, {})):
        with pytest.raises(UserError, match="shard-00000.safetensors is a symbolic link"):
            look(path)
    shard.unlink()
    shutil.move(tmp_path / "elsewhere", shard)
    assert not checkpoint.problems(path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints" / path.name).symlink_to(path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").symlink_to(tmp_path)
    for run in ("run", "other"):
        with pytest.raises(UserError, match="is a symbolic link"):
            checkpoint.find(tmp_path / run)


def chunk(offsets: list[int], shape: list[int]) -> dict[str, Any]:
    return {"offsets": offsets, "shape": shape, "bytes": 4 * shape[0] * shape[1]}


def halves(*parts: dict[str, Any]) -> Change:
    """The matrix in these chunks."""

    def change(index: dict[str, Any]) -> None:
        matrix = index["tensors"]["matrix"]
        matrix["chunks"] = [matrix["chunks"][0] | part for part in parts]

    return change


INDICES: dict[str, tuple[Change, str]] = {
    "twice the same half": (halves(chunk([0, 0], [2, 6]), chunk([0, 0], [2, 6])), "twice"),
    "overlapping": (halves(chunk([0, 0], [2, 6]), chunk([1, 0], [2, 6])), "twice"),
    "overlapping columns": (halves(chunk([0, 0], [4, 3]), chunk([0, 2], [4, 3])), "twice"),
    "a square inside": (halves(chunk([0, 0], [3, 6]), chunk([1, 1], [2, 3])), "twice"),
    "missing": (halves(chunk([0, 0], [2, 6])), "whole"),
    "foreign file": (halves(chunk([0, 0], [4, 6]) | {"file": "other"}), "is not in the files"),
    "beyond the file": (halves(chunk([0, 0], [4, 6]) | {"begin": 10**9}), "is not in the files"),
    "of other axes": (halves(chunk([0], [4, 6])), "no sense"),
    "another type": (lambda index: index["tensors"]["matrix"].update(dtype="torch.int32"), "torch.float32"),
    "a type of none": (lambda index: index["tensors"]["matrix"].update(dtype="os.system"), "os.system"),
    "text for a number": (halves(chunk([0, 0], [4, 6]) | {"begin": "0"}), "begin"),
    "a list of tensors": (lambda index: index.update(tensors=[]), "tensors"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_not_of_its_tensors_is_refused(tmp_path: Path, name: str) -> None:
    change, told = INDICES[name]
    whole = torch.arange(24.0).view(4, 6)
    write(tmp_path / "step-00000001", [("matrix", whole)], {}, 10**9)
    path = resealed(tmp_path / "step-00000001", "index.json", change)
    target = torch.zeros(4, 6)
    with pytest.raises(UserError, match=told):
        checkpoint.load(path, {"matrix": target})
    assert not target.any()


def test_chunks_of_any_grid_are_right(tmp_path: Path) -> None:
    """In any order, empty ones too, as ranks of a layout write them."""
    write(tmp_path / "step-00000001", [("matrix", torch.zeros(4, 6))], {}, 10**9)
    parts = [chunk([row, column], [2, 3]) for column in (3, 0) for row in (0, 2)] + [chunk([2, 2], [0, 3])]
    grid = {"matrix": {"dtype": "torch.float32", "shape": [4, 6], "chunks": []}}
    data = {"file": "shard-00000.safetensors", "begin": 0, "crc32": 0}
    grid["matrix"]["chunks"] = [part | data for part in parts]  # type: ignore[assignment]
    path = resealed(tmp_path / "step-00000001", "index.json", lambda index: index.update(tensors=grid))
    assert not checkpoint.problems(path)
    assert list(Tensors(path)) == ["matrix"]


def test_what_a_run_writes_is_right() -> None:
    state = json.loads((WRITTEN / "state.json").read_text()) | {"spikes": {"loss": [], "gradient norm": []}}
    assert schema.checked(schema.STATE, json.dumps(state)) == state
