"""The tensors of one checkpoint: safetensors files, and a JSON index of where every chunk of every tensor lies. Nothing
that is read, from a file or from another rank, is ever executed.

step-00000100/{shard-00000.safetensors, ..., index.json, state.json, manifest.json}

A chunk is the part of a tensor that a rank holds; on another layout a rank reads the chunks that overlap its own part.
PyTorch's DCP would do the same with collectives that pickle what they send.
"""

import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megahp.checkpoint import schema
from megahp.checkpoint.remote import Location, Remote
from megahp.checkpoint.schema import Chunk
from megahp.errors import UserError, is_user_error
from megahp.files import refuse_link
from megahp.parallel.messages import gather_results, on_rank0
from megahp.parallel.parameters import extent, storage

INDEX = "index.json"
LARGEST_JSON = 2**31  # bytes, before memory runs out on a file that is none; an index has about 150 for each chunk
DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
DTYPES |= {str(dtype): dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)}


class DamagedError(UserError):
    """A checkpoint, or a file of it, is missing or is not what was written. An older checkpoint may serve."""


class UnreadableError(UserError):
    """A file cannot be read, so it is not known whether it is missing, whole or damaged. No older checkpoint may serve
    in its stead: a passing failure of a disk would lose the steps since."""

    def __init__(self, why: str, may_pass: bool = False) -> None:
        super().__init__(why)
        self.may_pass = may_pass


class UploadError(UserError):
    """A checkpoint is whole on this disk, but not copied to checkpoint.remote."""


ERRORS = (UploadError, UnreadableError, DamagedError, UserError, OSError)  # that keep their class between ranks


@contextmanager
def reading(path: Location) -> Iterator[None]:
    """Raise DamagedError where this file is missing, and UnreadableError where the system refuses to read it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Location, error: OSError) -> UnreadableError:
    why = f"{path} cannot be read ({error.strerror}); make it readable, and start again"
    return UnreadableError(why, may_pass=not is_user_error(error))


@contextmanager
def naming(checkpoint: Location) -> Iterator[None]:
    """Raise a DamagedError of one of a checkpoint's files as the checkpoint's, with its name and the remedy."""
    try:
        yield
    except DamagedError as error:
        raise damaged(checkpoint, error) from None


def damaged(checkpoint: Location, why: object) -> DamagedError:
    return DamagedError(f"checkpoint {checkpoint} is damaged ({why}); remove it: the one before it then serves")


def write(
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    folder: Path,
    begin: Callable[[int], None],
    publish: Callable[[], None],
    group: dist.ProcessGroup | None,
) -> None:
    """Write the tensors of a checkpoint, whatever their layout, as one of the group's ranks, which all call this.

    copies: the values of this rank's parts, on the host; of the tensors themselves only the layout is read.
    Each chunk is written once, by the one of its holders that has least to write. Rank 0 calls begin(bytes) before
    anything is written, and publish() after everything is. A failure on one rank is raised on all, so that none waits
    for another and none publishes what is incomplete.
    """
    parts = {_key(name, tensor): (name, tensor, copies[name]) for name, tensor in tensors.items()}
    held = gather_results(lambda: {key: values.nbytes for key, (*_, values) in parts.items()}, group, ERRORS)

    def assign() -> dict[str, int]:
        writers, size = _assign_writers(held)
        begin(size)
        return writers

    # before anybody writes: begin() has made the folder, and found room
    writers = on_rank0(assign, group, ERRORS)
    rank = dist.get_rank(group)

    def write_own() -> list[tuple[str, dict[str, Any]]]:
        own = {key: part for key, part in parts.items() if writers.get(key, rank) == rank}
        return write_shard(own, folder / f"shard-{rank:05d}.safetensors") if own else []

    written = gather_results(write_own, group, ERRORS)

    def finish() -> None:
        index: dict[str, dict[str, Any]] = {}
        for name, entry in (each for of_rank in written for each in of_rank):
            index.setdefault(name, entry | {"chunks": []})["chunks"] += entry["chunks"]
        _write_index(folder, index)
        publish()

    on_rank0(finish, group, ERRORS)


def write_shard(parts: Mapping[str, tuple[str, Tensor, Tensor]], path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Write parts of tensors (key -> name, tensor, values) as one file. Returns names and entries in the index."""
    chunks = _write({key: (extent(tensor)[0], value.contiguous()) for key, (_, tensor, value) in parts.items()}, path)
    return [(name, _entry(tensor.dtype, tensor.shape, [chunks[key]])) for key, (name, tensor, _) in parts.items()]


def fill(folder: Location, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors, in place and on whatever layout they have, from a checkpoint: each rank reads the chunks that
    overlap its part.

    Raises DamagedError for what is not what was written, UnreadableError, and UserError for tensors that do not fit.
    """
    index, reads = read_index(folder), []
    for name, tensor in tensors.items():
        stored = index.get(name)
        needed, found = f"{tensor.dtype} {list(tensor.shape)}", stored and f"{stored['dtype']} {stored['shape']}"
        if stored is None or needed != found:
            why = f"{name} must be {needed}, and is {found or 'not in it'}"
            raise UserError(f"checkpoint {folder} cannot be loaded ({why}); remove it: the one before it then serves")
        offsets, sizes = extent(tensor)
        for chunk in stored["chunks"]:
            starts = [max(pair) for pair in zip(offsets, chunk.offsets, strict=True)]
            ends = [min(a + m, b + n) for a, m, b, n in zip(offsets, sizes, chunk.offsets, chunk.shape, strict=True)]
            lengths = [end - start for start, end in zip(starts, ends, strict=True)]
            if all(length > 0 for length in lengths):
                target = storage(tensor)[_window(starts, lengths, offsets)]
                reads.append((chunk, name, target, _window(starts, lengths, chunk.offsets)))
    # only now, when all fit; in the order of the files, which are read from front to back
    for chunk, name, target, window in sorted(reads, key=lambda read: (read[0].file, read[0].begin)):
        target.copy_(read_chunk(folder / chunk.file, chunk, target.dtype, name)[window])


class ByName(Mapping[str, Tensor]):
    """Tensors by name, each read from its file on access. index: metadata by name."""

    index: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


class Tensors(ByName):
    """The whole tensors of a checkpoint by name, each read on access, to the CPU."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        with naming(folder):
            self.index = read_index(folder)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.index[name]
        whole = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        for chunk in entry["chunks"]:
            with naming(self.folder):
                part = read_chunk(self.folder / chunk.file, chunk, whole.dtype, name)
            whole[_window(chunk.offsets, chunk.shape, [0] * whole.dim())] = part
        return whole


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Write whole tensors, one after another, as files of at most `limit` bytes and an index."""
    index = {}
    for number, group in enumerate(in_files(tensors, limit)):
        parts = {name: ([0] * tensor.dim(), tensor) for name, tensor in group.items()}
        for name, chunk in _write(parts, folder / f"shard-{number:05d}.safetensors").items():
            index[name] = _entry(group[name].dtype, group[name].shape, [chunk])
    _write_index(folder, index)


def in_files(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in their order, in groups of at most `limit` bytes, or of one tensor that has more. A group is
    emptied when the next is asked for, so that only one file's tensors are in memory."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield group
            group.clear()
            size = 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    yield group


def read_json(path: Location) -> bytes:
    """Return a JSON file of a checkpoint. Raises DamagedError, or UnreadableError."""
    with reading(path):
        if size_of(path) > LARGEST_JSON:
            raise DamagedError(f"{path.name} has {size_of(path):,} bytes, and {LARGEST_JSON:,} is the most")
        return path.read_bytes()


def size_of(path: Location) -> int:
    """Return a file's size in bytes. Raises DamagedError for what is no file, such as a pipe, UserError for a link, and
    OSError."""
    if isinstance(path, Remote):
        return path.size()
    refuse_link(path)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path.name} is not a regular file")
    return status.st_size


def read_index(folder: Location) -> dict[str, schema.Stored]:
    """Return every tensor's dtype, shape and chunks. Raises DamagedError unless chunks, in files of this folder, cover
    every tensor exactly once."""
    try:
        tensors: dict[str, schema.Stored] = schema.checked(schema.INDEX, read_json(folder / INDEX))["tensors"]
        for name, tensor in tensors.items():
            _check(name, tensor)
    except ValueError as error:
        raise DamagedError(f"{folder / INDEX}: {error}") from None
    return tensors


def read_chunk(path: Location, chunk: Chunk, dtype: torch.dtype, name: str) -> Tensor:
    """Return one chunk's values. Raises DamagedError, or UnreadableError."""
    with reading(path), path.open("rb") as file:
        file.seek(chunk.begin)
        data = bytearray(file.read(chunk.bytes))
    # the manifest's SHA-256 is of what the disk gave back after writing; this sum, of what was in memory
    if len(data) != chunk.bytes or zlib.crc32(data) != chunk.crc32:
        raise DamagedError(f"{path}: the part of {name} at byte {chunk.begin} is not what was written")
    values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return values.view(torch.Size(chunk.shape))


def digest(path: Location) -> str:
    """Return the SHA-256 of a file. Raises DamagedError, or UnreadableError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(target: Path, text: str) -> None:
    """Write a file that outlives a power cut, once its folder is synced too."""
    with target.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk, to outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _check(name: str, tensor: schema.Stored) -> None:
    """Raise ValueError unless every value of the tensor is in exactly one of its chunks."""
    if tensor["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of {tensor['dtype']}, which is none of {', '.join(DTYPES)}")
    shape, size = tensor["shape"], DTYPES[tensor["dtype"]].itemsize
    # not all pairs, which are too many on many ranks: a sweep along the axis that is cut most often compares each chunk
    # with the earlier ones that reach beyond its start
    begins = list(zip(*(chunk.offsets for chunk in tensor["chunks"]), strict=False))
    axis = max(range(len(begins)), key=lambda axis: len(set(begins[axis])), default=0)
    near: list[Chunk] = []
    for chunk in sorted(tensor["chunks"], key=lambda chunk: chunk.offsets[axis : axis + 1]):
        fits = len(chunk.offsets) == len(chunk.shape) == len(shape) and all(
            start + length <= side for start, length, side in zip(chunk.offsets, chunk.shape, shape, strict=True)
        )
        if not fits or chunk.bytes != math.prod(chunk.shape) * size:
            raise ValueError(f"a part of {name} makes no sense: {chunk}")
        near = [other for other in near if not shape or other.offsets[axis] + other.shape[axis] > chunk.offsets[axis]]
        if chunk.bytes and any(_overlap(other, chunk) for other in near):
            raise ValueError(f"{name} has a part twice: {chunk}")
        near.append(chunk)
    # none overlaps and none reaches outside: they cover it if they have as many values
    if sum(math.prod(chunk.shape) for chunk in tensor["chunks"]) != math.prod(shape):
        raise ValueError(f"the parts of {name} do not make it whole")


def _overlap(one: Chunk, other: Chunk) -> bool:
    ends = zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    return all(a < b + width and b < a + length for a, length, b, width in ends)


def _write(parts: Mapping[str, tuple[Sequence[int], Tensor]], path: Path) -> dict[str, Chunk]:
    """Write parts of tensors (key -> offsets, contiguous values) as a safetensors file, synced. Returns the chunks."""
    save_file({key: values for key, (_, values) in parts.items()}, path)  # which does not tell where the bytes lie
    with suppress(OSError):  # of file systems without modes
        path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask has made its folder; the library's own is 0600
    sync(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    chunks = {}
    for key, (offsets, values) in parts.items():
        data = values.reshape(-1).view(torch.uint8).numpy().data
        begin = 8 + length + header[key]["data_offsets"][0]
        chunks[key] = Chunk(list(offsets), list(values.shape), path.name, begin, len(data), zlib.crc32(data))
    return chunks


def _assign_writers(held: Sequence[Mapping[str, int]]) -> tuple[dict[str, int], int]:
    """Return the rank that writes each chunk which several hold, and the bytes of all. held: every rank's chunks and
    their bytes."""
    holders: dict[str, list[int]] = {}
    for rank, own in enumerate(held):
        for key in own:
            holders.setdefault(key, []).append(rank)
    planned, writers = [0] * len(held), {}
    for key, ranks in holders.items():
        writer = min(ranks, key=planned.__getitem__)
        planned[writer] += held[writer][key]
        if len(ranks) > 1:
            writers[key] = writer
    return writers, sum(planned)


def _key(name: str, tensor: Tensor) -> str:
    """Return the name in a file of this rank's part of a tensor: the tensor's, with the offsets where it is a part."""
    offsets, sizes = extent(tensor)
    return name if sizes == tuple(tensor.shape) else f"{name}@{','.join(map(str, offsets))}"


def _entry(dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Return the index's entry of a tensor."""
    return {"dtype": str(dtype), "shape": list(shape), "chunks": [asdict(chunk) for chunk in chunks]}


def _write_index(folder: Path, tensors: Mapping[str, Any]) -> None:
    write_synced(folder / INDEX, json.dumps({"tensors": tensors}, indent=0))


def _window(starts: Sequence[int], lengths: Sequence[int], offsets: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices of a region of a tensor in a part of it that begins at these offsets."""
    begins = [start - offset for start, offset in zip(starts, offsets, strict=True)]
    return tuple(slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True))
