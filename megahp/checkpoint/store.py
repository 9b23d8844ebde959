"""A folder of checkpoints: written in the background, visible by one rename when every byte is on the disk and
accounted for, refused by file when a byte has changed, dropped when newer ones serve.

checkpoints/step-00000100/{shard-00000.safetensors, ..., index.json, state.json, manifest.json}

The manifest holds the size and the SHA-256 of every file, and its own; nothing is loaded from a folder that does not
agree with its manifest. A run's checkpoint.remote gets copies, the manifest last.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megahp.checkpoint import schema, shards
from megahp.checkpoint.remote import Location, Remote, location
from megahp.checkpoint.shards import (
    INDEX,
    Damaged,
    UnreadableError,
    UploadError,
    digest,
    read_index,
    read_json,
    reading,
    size_of,
    sync,
    unreadable,
    write_synced,
    write_tensors,
)
from megahp.config import CheckpointConfig, Config, resolve
from megahp.errors import Fault, UserError
from megahp.files import refuse_link, refuse_links
from megahp.parallel.messages import gather_results, on_rank0
from megahp.parallel.parameters import storage


def _with_spikes(state: dict[str, Any]) -> dict[str, Any]:
    """Version 4 holds the window that spikes stand out of."""
    return state | {"spikes": {"loss": [], "gradient norm": []}}


OLDEST = 3  # before it the index was a pickle, which is not read
# what makes the state of the oldest version one of the next, then that one, ...; files stay as they are
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_with_spikes,)
VERSION = OLDEST + len(MIGRATIONS)
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8}")
P = TypeVar("P", Path, Remote, Location)


class DamagedError(UserError):
    """A checkpoint is not what was written; another may be."""


class Store:
    """The checkpoints of a run. Every rank makes one, and calls its methods in the same order."""

    def __init__(self, folder: Path, keep: CheckpointConfig) -> None:
        self.folder, self.keep = folder, keep
        # the background's own, so that its messages never meet the training's; and copying takes its time
        patience = timedelta(days=1)
        self.group = dist.new_group(backend="gloo", timeout=patience) if dist.get_world_size() > 1 else None
        self.background = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.copies: dict[str, Tensor] = {}
        self.target = folder

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy tensors and state, and write them as a checkpoint in the background, after the one before it.

        state is JSON. Raises UserError, on every rank, when the one before could not be written.
        """
        self.wait()
        self.target = path(self.folder, step)
        partial, said = self.folder / f".partial-{step:08d}", _in_words(state)

        def prepare(size: int) -> None:
            for unfinished in self.folder.glob(".partial-*"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
            if (free := shutil.disk_usage(self.folder).free) < size:
                raise OSError(f"it takes {size:,} bytes and {free:,} are free")

        def finish() -> None:
            publish(partial, self.target, said)
            for dropped in superseded(self.folder, self.target, self.keep):
                remove(dropped)
            if self.keep.remote:
                copy_all(self.folder, self.target, self.keep)

        def save() -> None:
            copied = {name: _on_host(value, self.copies[name]) for name, value in tensors.items()}
            shards.write(copied, partial, prepare, finish, self.group)

        # by hand, since DCP's staging of a hundred DTensors takes ten times as long as the copies; so does fresh memory
        for name, value in tensors.items():
            part = storage(value)
            if name not in self.copies:
                self.copies[name] = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
            self.copies[name].copy_(part, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.writing = self.background.submit(save)

    def wait(self) -> None:
        """Until what was begun is on the disk, and copied. Raises UserError, on every rank, when that failed; the
        checkpoints before it are untouched."""
        if self.writing is None:
            return
        try:
            self.writing.result()
        except (OSError, Fault) as error:
            why = f"checkpoint {self.target} cannot be written ({_cause(error)}); make room in {self.folder}"
            raise UserError(why) from None
        finally:
            self.writing = None


def write(target: Path, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any], limit: int) -> None:
    """Write a checkpoint from this process alone, in files of `limit` bytes, of tensors that need not all be in memory
    at a time."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial, tensors, limit)
    publish(partial, target, _in_words(state))


def publish(partial: Path, target: Path, state: str) -> None:
    """Give a folder that holds the tensors all else that makes a checkpoint, last of all its name."""
    write_synced(partial / "state.json", state)
    write_manifest(partial)
    if target.exists():  # of the same step, damaged or gone back before; but nothing that nobody could look at is lost
        problems(target, shards=False)
        remove(target)
    partial.rename(target)
    sync(target.parent)


def copy_all(folder: Path, newest: Path, keep: CheckpointConfig) -> None:
    """Copy the checkpoints that keep.remote has not, or has otherwise, and drop there what need not be kept beside the
    newest. Raises UserError."""
    there = copies_at(keep.remote)
    try:
        for checkpoint in complete_without_links(folder):
            if not problems(checkpoint, shards=False):
                copy(checkpoint, there / checkpoint.name)
        for dropped in superseded(there, there / newest.name, keep):
            remove(dropped)
    except (OSError, UnreadableError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        why = f"{newest} is whole, but not copied to checkpoint.remote = {keep.remote!r} ({cause})"
        raise UploadError(f"{why}; that is tried again after the next one") from None


def copy(checkpoint: Path, target: Remote) -> None:
    """Make the target this checkpoint; it is one when its manifest comes, last. Raises OSError."""
    manifest = checkpoint / MANIFEST
    if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == manifest.read_bytes():
        return
    remove(target)
    target.put([checkpoint / name for name in read_manifest(checkpoint)])
    target.put([manifest])


def copies_at(remote: str) -> Remote:
    """The folder of the copies. Raises UserError."""
    if isinstance(run := location(remote), Path):
        raise UserError(f"checkpoint.remote = {remote!r} is no URL; for a folder of this machine write file:///...")
    return run / "checkpoints"


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint after this step lies, once complete."""
    return folder / f"step-{step:08d}"


def complete(folder: P) -> list[P]:
    """A run's complete checkpoints, damaged or not, oldest first; none where there is no such folder. Raises
    UnreadableError where that cannot be known, UserError for a symbolic link in the place of one."""
    if isinstance(folder, Path):
        refuse_link(folder)
        for each in folder.glob("step-*"):
            if NAME.fullmatch(each.name):
                refuse_link(each)
    return complete_without_links(folder)


def complete_without_links(folder: P) -> list[P]:
    """As `complete`, links passed over: a running training is not ended by one that somebody has made."""
    try:
        each_there = folder.iterdir() if isinstance(folder, Path) else folder.glob("step-*")
        found: list[P] = sorted((each for each in each_there if NAME.fullmatch(each.name)), key=lambda each: each.name)
        # elsewhere folders are not renamed, the manifest comes last
        return [
            each for each in found if (not each.is_symlink() if isinstance(each, Path) else (each / MANIFEST).exists())
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from None


def candidates(folder: Path, remote: str) -> list[Location]:
    """What a run may go on from, newest first, copies at its checkpoint.remote (empty = none) among them. Raises
    UserError."""
    try:
        copies = complete(copies_at(remote)) if remote else []
    except UnreadableError as error:
        why = f"{error}, or without checkpoint.remote to go on from {folder} alone"
        raise UnreadableError(why, error.may_pass) from None
    found: list[Location] = [*copies, *complete(folder)]
    return sorted(found, key=lambda each: each.name)[::-1]  # a copy after its original


def latest(folder: P) -> P | None:
    """The newest checkpoint whose files are all there and whose JSON is whole; None where there is no checkpoint. Its
    tensors are for `load` to check. Raises UserError when none is whole."""
    return first_valid(complete(folder)[::-1])


def first_valid(newest_first: Sequence[P]) -> P | None:
    """As `latest`, of these."""
    whole = next((each for each in newest_first if not problems(each, shards=False)), None)
    if newest_first and not whole:
        newest, why = newest_first[0], problems(newest_first[0], shards=False)[0]
        raise UserError(f"checkpoint {newest} is damaged ({why}), and so are all before it; restore one from a copy")
    return whole


def find(location: P) -> P:
    """A checkpoint that was named itself, or by its run directory: then the newest. Raises UserError."""
    if isinstance(location, Path):
        refuse_links(location)
    with reading(location / MANIFEST):
        is_checkpoint = (location / MANIFEST).exists()
    found = location if is_checkpoint else latest(location / "checkpoints")
    if found is None:
        raise UserError(f"{location} is neither a checkpoint nor a run directory that has one; name one that is")
    return found


def read_state(checkpoint: Location) -> dict[str, Any]:
    """The JSON part, as this version has it. Raises DamagedError if it is not what was written, UserError for a version
    that is not read."""
    if wrong := problems(checkpoint, shards=False):
        raise DamagedError(f"checkpoint {checkpoint} is damaged ({wrong[0]}); {_remedy(checkpoint)}")
    try:
        state = json.loads(read_json(checkpoint / "state.json"))
        for migrate in MIGRATIONS[state["version"] - OLDEST :]:
            state = migrate(state)
        return schema.checked(schema.STATE, json.dumps(state))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise DamagedError(f"{checkpoint / 'state.json'} is damaged ({why}); {_remedy(checkpoint)}") from None


def settings_of(checkpoint: Location) -> Config:
    """The settings it was written under. Raises DamagedError, or UserError."""
    return resolve.from_dict(read_state(checkpoint)["config"], str(checkpoint))


def load(checkpoint: Location, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, in place and on whatever layout they have. All ranks read, and check every file between them,
    before a tensor is touched. Raises DamagedError naming what is wrong, or UserError."""
    if wrong := check(checkpoint):
        raise DamagedError(f"checkpoint {checkpoint} is damaged ({wrong[0]}); {_remedy(checkpoint)}")

    def read() -> None:
        try:
            shards.fill(checkpoint, tensors)
        except UnreadableError:
            raise
        except Exception as error:  # DCP raises many kinds
            why = f"checkpoint {checkpoint} cannot be loaded ({_cause(error)}); {_remedy(checkpoint)}"
            raise UserError(why) from None

    gather_results(read, kinds=shards.ERRORS)


def check(checkpoint: Location) -> list[str]:
    """What is wrong with a checkpoint's files, found by all ranks together: each reads its share of them. Raises
    UnreadableError, on all ranks, where one of them cannot."""
    mine = gather_results(lambda: problems(checkpoint, dist.get_rank(), dist.get_world_size()), kinds=shards.ERRORS)
    return on_rank0(lambda: list(dict.fromkeys(problem for of_rank in mine for problem in of_rank)))


def problems(checkpoint: Location, rank: int = 0, ranks: int = 1, shards: bool = True) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each: nothing may be missing, longer, shorter or changed.
    Raises UnreadableError for what cannot be looked at.

    Every rank-th of `ranks` files is read; without `shards` the tensors' files are only measured.
    """
    try:
        files = read_manifest(checkpoint)
    except Damaged as error:
        return [str(error)]
    found = []
    for number, (name, entry) in enumerate(files.items()):
        file = checkpoint / name
        is_read = shards and number % ranks == rank or name.endswith(".json")
        try:
            with reading(file):
                size = size_of(file)
            if size != entry["bytes"]:
                found.append(f"{name} has {size:,} bytes and was written with {entry['bytes']:,}")
            elif is_read and digest(file) != entry["sha256"]:
                found.append(f"{name} is not what was written")
        except Damaged as error:
            found.append(str(error))
    return found if found or not shards or rank else _misplaced(checkpoint, files)


def _misplaced(checkpoint: Location, files: Mapping[str, schema.Entry]) -> list[str]:
    """Return the tensors of which a part is not in a listed file, one line each."""
    if INDEX not in files:
        return [f"{MANIFEST} does not list {INDEX}"]
    try:
        index = read_index(checkpoint)
    except Damaged as error:
        return [str(error)]
    return [
        f"a part of {name} is not in the files that {MANIFEST} lists: {chunk}"
        for name, tensor in index.items()
        for chunk in tensor["chunks"]
        if chunk.file not in files or chunk.begin + chunk.bytes > files[chunk.file]["bytes"]
    ]


def write_manifest(checkpoint: Path) -> None:
    """List every file of a folder; the list ends with its own digest."""
    files = sorted(checkpoint.iterdir())
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": digest(file)} for file in files}
    write_synced(checkpoint / MANIFEST, _sealed(entries, VERSION))
    sync(checkpoint)


def read_manifest(checkpoint: Location) -> dict[str, schema.Entry]:
    """Name -> bytes and sha256. Raises Damaged unless every byte of it is as written, UserError for a version that is
    not read, UnreadableError."""
    text = read_json(checkpoint / MANIFEST)
    try:
        manifest = schema.checked(schema.MANIFEST, text)
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is not what was written ({error})") from None
    version, files = manifest["version"], manifest["files"]
    if text != _sealed(files, version).encode():
        raise Damaged(f"{MANIFEST} is not what was written")
    if not OLDEST <= version <= VERSION:
        why = f"checkpoint {checkpoint} is of version {version} and this megahp reads {OLDEST} to {VERSION}"
        raise UserError(f"{why}; read it with the one that wrote it, or a newer one")
    if "state.json" not in files:
        raise Damaged(f"{MANIFEST} does not list state.json")
    return files


def superseded(folder: P, newest: P, keep: CheckpointConfig) -> list[P]:
    """What need not be kept beside a checkpoint that was just published: all older ones but the newest few, those at
    every so many steps, and the one of least validation loss."""
    older = [each for each in complete_without_links(folder) if each.name <= newest.name]
    kept = set(older[-keep.keep :])
    if keep.keep_every:
        kept |= {each for each in older if int(each.name.removeprefix("step-")) % keep.keep_every == 0}
    if keep.keep_best:
        losses = {}
        for each in older:
            try:
                losses[each] = _validation_loss(each)
            except UnreadableError:  # which may be the best
                kept.add(each)
        known = {each: loss for each, loss in losses.items() if loss is not None}
        kept |= {min(known, key=lambda each: known[each])} if known else set()
    return [each for each in older if each not in kept]


def remove(checkpoint: Location) -> None:
    """Drop a checkpoint; one that is half gone is none."""
    if isinstance(checkpoint, Remote):
        (checkpoint / MANIFEST).remove()
        checkpoint.remove()
        return
    going = checkpoint.with_name(f".partial-{checkpoint.name}")
    checkpoint.rename(going)
    shutil.rmtree(going)


def _on_host(value: Tensor, copy: Tensor) -> Tensor:
    """A tensor laid out as the value is, whose part is this copy, where it is: DTensor.from_local would move it to the
    mesh's devices."""
    return DTensor(copy, value._spec, requires_grad=False) if isinstance(value, DTensor) else copy


def _in_words(state: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **state}, indent=1)


def _validation_loss(checkpoint: Location) -> float | None:
    """Return that of a checkpoint, None where it has none or is damaged. Raises UnreadableError."""
    try:
        loss = json.loads(read_json(checkpoint / "state.json"))["validation_loss"]
        return loss if isinstance(loss, float) else None
    except (Damaged, ValueError, TypeError, KeyError, RecursionError):
        return None


def _sealed(files: Mapping[str, Any], version: int) -> str:
    body = {"version": version, "files": files}
    sha256 = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha256}, indent=1)


def _cause(error: BaseException) -> str:
    """Why it failed, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _remedy(checkpoint: Location) -> str:
    return f"remove {checkpoint}: the one before it then serves"
