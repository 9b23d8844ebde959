"""A folder of checkpoints: written in the background, visible by one rename once every byte is on the disk and listed,
refused, with the file named, when a byte has changed, and removed when newer ones serve.

checkpoints/step-00000100/{shard-00000.safetensors, ..., index.json, state.json, manifest.json}

The manifest holds the size and the SHA-256 of every file, and its own; `load` compares every byte with it before a
weight is touched (`problems`), and each chunk's CRC32 as it reads that (shards.read_chunk). A run's checkpoint.remote
gets copies, the manifest last.

The order of writing is what keeps them safe. Each file is synced after it is written: tensors, index, state. The
manifest, written last, lists what was in memory of them: what changes on the way to the disk differs from it. Then
the folder is synced, renamed, and its parent synced. So whatever kills the writer, a folder that is named step-* is
whole, and one that is named .partial-* is ignored.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.checkpoint import schema, shards
from megahp.checkpoint.remote import Location, Remote, location
from megahp.checkpoint.shards import INDEX, DamagedError, UnreadableError, digest, read_index, reading, size_of
from megahp.config import CheckpointConfig, Config, resolve
from megahp.errors import Fault, UserError
from megahp.files import refuse_link, refuse_links
from megahp.parallel.messages import gather_results, on_rank0
from megahp.parallel.parameters import storage


def _with_spikes(state: dict[str, Any]) -> dict[str, Any]:
    """Add the window of spikes, which version 4 has."""
    return state | {"spikes": {"loss": [], "gradient norm": []}}


OLDEST = 3  # before it the index was a pickle, which is not read
# the first turns a state of the oldest version into one of the next, and so on; files are not rewritten
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_with_spikes,)
VERSION = OLDEST + len(MIGRATIONS)
MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{8}")
P = TypeVar("P", Path, Remote, Location)


class Store:
    """The checkpoints of a run. Every rank makes one, and calls its methods in the same order."""

    def __init__(self, folder: Path, keep: CheckpointConfig) -> None:
        self.folder, self.keep = folder, keep
        # the background's own group, so that its messages never meet the training's; copying to a remote takes its time
        timeout = timedelta(days=1)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
        self.background = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.copies: dict[str, Tensor] = {}  # on the host, kept from save to save: fresh memory takes longer to fill
        self.target = folder

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy tensors and state, and write them as a checkpoint in the background.

        state is JSON. Raises UserError, on every rank, when the checkpoint before could not be written.
        """
        self.wait()  # one at a time: they share the copies and the group
        self.target = path(self.folder, step)
        partial, state_json = self.folder / f".partial-{step:08d}", _to_json(state)

        def prepare(size: int) -> None:
            for unfinished in self.folder.glob(".partial-*"):  # of a process that was killed
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
            if (free := shutil.disk_usage(self.folder).free) < size:  # now, not after minutes of writing
                raise OSError(f"it takes {size:,} bytes and {free:,} are free")

        def finish(digests: dict[str, str]) -> None:
            publish(partial, self.target, state_json, digests)
            for old in superseded(self.folder, self.target, self.keep):  # only once a newer one is published
                remove(old)
            if self.keep.remote:
                copy_all(self.folder, self.target, self.keep)

        # before this returns, since training changes the tensors; by hand, since DCP's staging of a hundred DTensors
        # takes ten times as long
        for name, value in tensors.items():
            part = storage(value)
            if name not in self.copies:
                self.copies[name] = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
            self.copies[name].copy_(part, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        arguments = tensors, self.copies, partial, prepare, finish, self.group
        self.writing = self.background.submit(shards.write, *arguments)

    def wait(self) -> None:
        """Wait until the checkpoint begun is on the disk, and copied. Raises UserError, on every rank, when that
        failed; the checkpoints before it are untouched."""
        if self.writing is None:
            return
        try:
            self.writing.result()
        except (OSError, Fault) as error:
            cause, *_ = str(error).strip().splitlines() or [type(error).__name__]
            why = f"checkpoint {self.target} cannot be written ({cause}); make room in {self.folder}"
            raise UserError(why) from None
        finally:
            self.writing = None


def write(target: Path, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any], limit: int) -> None:
    """Write a checkpoint from this process alone, in files of at most `limit` bytes, of tensors that need not all be in
    memory at a time."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digests = shards.write_tensors(partial, tensors, limit)
    publish(partial, target, _to_json(state), digests)


def publish(partial: Path, target: Path, state: str, digests: Mapping[str, str]) -> None:
    """Make a folder that holds the tensors a checkpoint: add state and manifest, then rename it. digests: the SHA-256
    of the files that are there.

    All its files are on the disk before it has the name under which it is loaded, and the name itself is on the disk
    when this returns: the caller removes older checkpoints then.
    """
    write_manifest(partial, {**digests, **shards.write_synced(partial / "state.json", state)})
    if target.exists():  # of the same step: damaged, or from before a restart at an older one
        problems(target, shards=False)  # raises where it cannot be read: it may be whole, and is not removed
        remove(target)
    partial.rename(target)
    shards.sync(target.parent)


def copy_all(folder: Path, newest: Path, keep: CheckpointConfig) -> None:
    """Copy the checkpoints that keep.remote lacks, or has in another version, and remove there what need not be kept
    beside the newest. Raises UserError."""
    remote = copies_at(keep.remote)
    try:
        for checkpoint in complete_without_links(folder):
            if not problems(checkpoint, shards=False):
                copy(checkpoint, remote / checkpoint.name)
        for old in superseded(remote, remote / newest.name, keep):
            remove(old)
    except (OSError, UnreadableError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        why = f"{newest} is whole, but not copied to checkpoint.remote = {keep.remote!r} ({cause})"
        raise shards.UploadError(f"{why}; this is retried with the next one") from None


def copy(checkpoint: Path, target: Remote) -> None:
    """Copy a checkpoint, unless it is there. Raises OSError.

    Remote file systems have no rename of folders: a folder is a checkpoint once it has a manifest, which is put last.
    """
    manifest = checkpoint / MANIFEST
    if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == manifest.read_bytes():
        return
    remove(target)  # its manifest first, or old and new files would be one checkpoint for a moment
    target.put([checkpoint / name for name in read_manifest(checkpoint)])
    target.put([manifest])


def copies_at(remote: str) -> Remote:
    """Return the folder of the copies. Raises UserError."""
    if isinstance(run := location(remote), Path):
        raise UserError(f"checkpoint.remote = {remote!r} is not a URL; for a folder of this machine write file:///...")
    return run / "checkpoints"


def path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after this step lies, once complete."""
    return folder / f"step-{step:08d}"


def complete(folder: P) -> list[P]:
    """Return a run's complete checkpoints, damaged or not, oldest first; none where there is no such folder. Raises
    UnreadableError where that cannot be known, UserError for a symbolic link in the place of one."""
    if isinstance(folder, Path):
        refuse_link(folder)
        for each in folder.glob("step-*"):
            if NAME.fullmatch(each.name):
                refuse_link(each)
    return complete_without_links(folder)


def complete_without_links(folder: P) -> list[P]:
    """Return what `complete` returns, but skip links: one that somebody makes must not end a run that is training."""
    try:
        entries = folder.iterdir() if isinstance(folder, Path) else folder.glob("step-*")
        found: list[P] = sorted((each for each in entries if NAME.fullmatch(each.name)), key=lambda each: each.name)
        # a remote folder gets its manifest last, a local one its name
        return [
            each for each in found if (not each.is_symlink() if isinstance(each, Path) else (each / MANIFEST).exists())
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise shards.unreadable(folder, error) from None


def candidates(folder: Path, remote: str) -> list[Location]:
    """Return the checkpoints that a run may resume from, newest first, with the copies at checkpoint.remote (empty =
    none). Raises UserError."""
    try:
        copies = complete(copies_at(remote)) if remote else []
    except UnreadableError as error:
        why = f"{error}, or without checkpoint.remote to resume from {folder} alone"
        raise UnreadableError(why, error.may_pass) from None
    found: list[Location] = [*copies, *complete(folder)]
    return sorted(found, key=lambda each: each.name)[::-1]  # a copy after its original


def latest(folder: P) -> P | None:
    """Return the newest checkpoint whose files all exist and whose JSON is whole; None where there is no checkpoint.
    `load` checks the tensors. Raises UserError when all are damaged."""
    return first_valid(complete(folder)[::-1])


def first_valid(newest_first: Sequence[P]) -> P | None:
    """Return what `latest` returns, among these checkpoints."""
    why = ""
    for checkpoint in newest_first:
        if not (found := problems(checkpoint, shards=False)):
            return checkpoint
        why = why or f"checkpoint {checkpoint} is damaged ({found[0]})"
    if why:
        raise UserError(f"{why}, and so are all before it; restore one from a copy")
    return None


def find(location: P) -> P:
    """Return the checkpoint at this location, or the newest one of the run directory, or of its folder `checkpoints`,
    that it names. Raises UserError."""
    if is_checkpoint(location):
        return location
    found = latest(folder_of(location))
    if found is None:
        raise UserError(f"{location} {none_in(location)}")
    return found


def is_checkpoint(location: Location) -> bool:
    """Return whether this is a checkpoint, damaged or not, rather than a folder of checkpoints. Raises UserError."""
    if isinstance(location, Path):
        refuse_links(location)
    with reading(location / MANIFEST):
        if isinstance(location, Path) and NAME.fullmatch(location.name) and location.is_dir():
            return True  # its manifest may be what is missing
        return (location / MANIFEST).exists()


def folder_of(location: P) -> P:
    """Return the folder of checkpoints of a run directory, or the folder itself if it is one."""
    return location if location.name == "checkpoints" and complete(location) else location / "checkpoints"


def none_in(location: Location) -> str:
    """Return why this location has no checkpoint, and what to name instead."""
    if isinstance(location, Path) and any((location / name).exists() for name in ("config.toml", "events.jsonl")):
        return "is a run that has no checkpoint yet; wait for its first, set checkpoint.every, or name another run"
    return "is neither a checkpoint nor a run directory that has one; name one that is, such as runs/mine"


def read_state(checkpoint: Location) -> dict[str, Any]:
    """Return the JSON state, brought up to this version, with paths in the run directory where that is now. Raises
    DamagedError if it is not what was written, UserError for a version that is not supported."""
    if found := problems(checkpoint, shards=False):
        raise shards.damaged(checkpoint, found[0])
    try:
        state = json.loads(shards.read_json(checkpoint / "state.json"))
        for migrate in MIGRATIONS[state["version"] - OLDEST :]:
            state = migrate(state)
        # as JSON again: strict types treat Python's own objects otherwise
        state = schema.checked(schema.STATE, json.dumps(state))
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise shards.damaged(checkpoint, f"state.json: {why}") from None
    if isinstance(checkpoint, Path):
        state["config"] = resolve.placed(state["config"], checkpoint.parent.parent)
    return state


def settings_of(checkpoint: Location) -> Config:
    """Return the config that it was written under. Raises DamagedError, or UserError."""
    return resolve.from_dict(read_state(checkpoint)["config"], str(checkpoint))


def fingerprint(checkpoint: Location) -> str:
    """Return a hash of all that a checkpoint holds, the same wherever it lies."""
    read_manifest(checkpoint)  # which is what was written
    return digest(checkpoint / MANIFEST)


def load(checkpoint: Location, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, in place and on whatever layout they have, as one of the ranks, which all call this.

    The ranks share out the files and compare every byte with the manifest before a tensor is touched. Raises
    DamagedError, on all ranks, for what is wrong on one: some tensors are filled by then, if it is a chunk's checksum.
    Raises UnreadableError, or UserError for what does not fit.
    """
    found = gather_results(lambda: problems(checkpoint, dist.get_rank(), dist.get_world_size()), kinds=shards.ERRORS)
    if why := on_rank0(lambda: next((problem for of_rank in found for problem in of_rank), "")):
        raise shards.damaged(checkpoint, why)

    def read() -> None:
        with shards.naming(checkpoint):
            shards.fill(checkpoint, tensors)

    gather_results(read, kinds=shards.ERRORS)


def problems(checkpoint: Location, rank: int = 0, ranks: int = 1, shards: bool = True) -> list[str]:
    """Return what is wrong with the files of a checkpoint, one line each: missing, longer, shorter or changed. Raises
    UnreadableError for what cannot be read.

    The tensors' files are divided over `ranks` ranks; every rank reads the JSON files. Without `shards` only the sizes
    of the tensors' files are compared.
    """
    try:
        files = read_manifest(checkpoint)
    except DamagedError as error:
        return [str(error)]
    found = []
    for number, (name, entry) in enumerate(files.items()):
        file = checkpoint / name
        is_read = shards and number % ranks == rank or name.endswith(".json")  # small, and used by all
        try:
            with reading(file):
                size = size_of(file)
            if size != entry["bytes"]:
                found.append(f"{name} has {size:,} bytes and was written with {entry['bytes']:,}")
            elif is_read and digest(file) != entry["sha256"]:
                found.append(f"{name} is not what was written")
        except DamagedError as error:
            found.append(str(error))
    if found or not shards or rank:
        return found
    # whole files, but is each part of a tensor in one of them? Whoever has written the manifest may have listed any
    if INDEX not in files:
        return [f"{MANIFEST} does not list {INDEX}"]
    try:
        index = read_index(checkpoint)
    except DamagedError as error:
        return [str(error)]
    return [
        f"a part of {name} is not in the files that {MANIFEST} lists: {chunk}"
        for name, tensor in index.items()
        for chunk in tensor["chunks"]
        if chunk.file not in files or chunk.begin + chunk.bytes > files[chunk.file]["bytes"]
    ]


def write_manifest(checkpoint: Path, digests: Mapping[str, str] = MappingProxyType({})) -> None:
    """List every file of a folder, with a digest of the list itself. digests: the files' SHA-256 where it is known; of
    others it is of what the disk gives back."""
    files = sorted(checkpoint.iterdir())
    sums = {file.name: digests.get(file.name) or digest(file) for file in files}
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sums[file.name]} for file in files}
    shards.write_synced(checkpoint / MANIFEST, _sealed(entries, VERSION))
    shards.sync(checkpoint)


def read_manifest(checkpoint: Location) -> dict[str, schema.Entry]:
    """Return the manifest: name -> bytes and sha256. Raises DamagedError unless every byte of it is as written,
    UserError for a version that is not supported, UnreadableError."""
    text = shards.read_json(checkpoint / MANIFEST)
    try:
        manifest = schema.checked(schema.MANIFEST, text)
    except ValueError as error:
        raise DamagedError(f"{MANIFEST} is not what was written ({error})") from None
    version, files = manifest["version"], manifest["files"]
    # as text, so that every byte of it counts
    if text != _sealed(files, version).encode():
        raise DamagedError(f"{MANIFEST} is not what was written")
    if not OLDEST <= version <= VERSION:
        why = f"checkpoint {checkpoint} is of version {version} and this megahp reads {OLDEST} to {VERSION}"
        raise UserError(f"{why}; read it with the one that wrote it, or a newer one")
    if "state.json" not in files:
        raise DamagedError(f"{MANIFEST} does not list state.json")
    return files


def superseded(folder: P, newest: P, keep: CheckpointConfig) -> list[P]:
    """Return what need not be kept beside a checkpoint that was just published: older ones, except the newest
    keep.keep, those at every keep.keep_every steps, and with keep.keep_best the one of least validation loss."""
    # not those with higher steps: they were refused or rewound, and are replaced when their step comes again
    older = [each for each in complete_without_links(folder) if each.name <= newest.name]
    kept = set(older[-keep.keep :])
    if keep.keep_every:
        kept |= {each for each in older if int(each.name.removeprefix("step-")) % keep.keep_every == 0}
    if keep.keep_best:
        losses = {}
        for each in older:
            try:
                losses[each] = validation_loss_of(each)
            except UnreadableError:  # it may be the best
                kept.add(each)
        known = {each: loss for each, loss in losses.items() if loss is not None}
        kept |= {min(known, key=lambda each: known[each])} if known else set()
    return [each for each in older if each not in kept]


def remove(checkpoint: Location) -> None:
    """Remove a checkpoint. First it loses what makes it one, its manifest or name, so that half of it is none."""
    if isinstance(checkpoint, Remote):
        (checkpoint / MANIFEST).remove()
        checkpoint.remove()
        return
    partial = checkpoint.with_name(f".partial-{checkpoint.name}")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _to_json(state: Mapping[str, Any]) -> str:
    return json.dumps({"version": VERSION, **state}, indent=1)


def validation_loss_of(checkpoint: Location) -> float | None:
    """Return a checkpoint's validation loss, None where it has none or is damaged. Raises UnreadableError."""
    try:
        loss = json.loads(shards.read_json(checkpoint / "state.json"))["validation_loss"]
        return loss if isinstance(loss, float) and math.isfinite(loss) else None  # or min() would keep a NaN
    except (DamagedError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _sealed(files: Mapping[str, Any], version: int) -> str:
    body = {"version": version, "files": files}
    sha256 = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": sha256}, indent=1)
