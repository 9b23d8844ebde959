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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate, groupby, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.checkpoint import schema
from megahp.checkpoint.remote import Location, Remote
from megahp.checkpoint.schema import Chunk
from megahp.errors import UserError, is_user_error
from megahp.files import refuse_link
from megahp.parallel.messages import gather_results, on_rank0
from megahp.parallel.parameters import boxes, storage

INDEX = "index.json"
LARGEST_JSON = 2**31  # bytes, before memory runs out on a file that is none; an index has about 150 for each chunk
BLOCK = 2**20  # bytes hashed at a time: they stay in a core's cache, and a thread's hand-over costs nothing
SAFETENSORS = {  # names of the types, in the order in which the library lays them out in a file
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {str(dtype): dtype for dtype in SAFETENSORS}


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
    publish: Callable[[dict[str, str]], None],
    group: dist.ProcessGroup | None,
) -> None:
    """Write the tensors of a checkpoint, whatever their layout, as one of the group's ranks, which all call this.

    copies: the values of this rank's parts, on the host; of the tensors themselves only the layout is read.
    Each chunk is written once, by the one of its holders that has least to write. Rank 0 calls begin(bytes) before
    anything is written, and publish(SHA-256 by file) after everything is. A failure on one rank is raised on all, so
    that none waits for another and none publishes what is incomplete.
    """
    parts = {
        _key(name, tensor, offsets, values): (name, tensor, offsets, values)
        for name, tensor in tensors.items()
        for offsets, values in boxes(tensor, copies[name])
    }
    held = gather_results(lambda: {key: values.nbytes for key, (*_, values) in parts.items()}, group, ERRORS)

    def assign() -> dict[str, int]:
        writers, size = _assign_writers(held)
        begin(size)
        return writers

    # before anybody writes: begin() has made the folder, and found room
    writers = on_rank0(assign, group, ERRORS)
    rank = dist.get_rank(group)

    def write_own() -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
        own = {key: part for key, part in parts.items() if writers.get(key, rank) == rank}
        return write_shard(own, folder / f"shard-{rank:05d}.safetensors") if own else ([], {})

    written = gather_results(write_own, group, ERRORS)

    def finish() -> None:
        index: dict[str, dict[str, Any]] = {}
        for name, entry in (each for entries, _ in written for each in entries):
            index.setdefault(name, entry | {"chunks": []})["chunks"] += entry["chunks"]
        digests = {file: sha256 for _, of_rank in written for file, sha256 in of_rank.items()}
        publish(digests | _write_index(folder, index))

    on_rank0(finish, group, ERRORS)


def write_shard(
    parts: Mapping[str, tuple[str, Tensor, tuple[int, ...], Tensor]], path: Path
) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    """Write parts of tensors (key -> name, tensor, offsets, values) as one file. Returns names and entries in the
    index, and the file's SHA-256 by its name."""
    offsets_and_values = {key: (offsets, values.contiguous()) for key, (*_, offsets, values) in parts.items()}
    chunks, sha256 = _write(offsets_and_values, path)
    entries = [(name, _entry(tensor.dtype, tensor.shape, [chunks[key]])) for key, (name, tensor, *_) in parts.items()]
    return entries, {path.name: sha256}


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
        for (offsets, part), chunk in product(boxes(tensor, storage(tensor)), stored["chunks"]):
            starts = [max(pair) for pair in zip(offsets, chunk.offsets, strict=True)]
            sides = zip(offsets, part.shape, chunk.offsets, chunk.shape, strict=True)
            lengths = [min(a + m, b + n) - start for start, (a, m, b, n) in zip(starts, sides, strict=True)]
            if all(length > 0 for length in lengths):
                target = part[_window(starts, lengths, offsets)]
                reads.append((chunk, name, target, _window(starts, lengths, chunk.offsets)))

    # only now, when all fit; in the order of the files, which are read from front to back, and each chunk once
    def place(read: tuple[Chunk, str, Tensor, Any]) -> tuple[str, int]:
        return read[0].file, read[0].begin

    for _, group in groupby(sorted(reads, key=place), key=place):
        parts = list(group)
        chunk, name, target, _ = parts[0]
        path = folder / chunk.file
        if target.nbytes == chunk.bytes and target.is_cpu and target.is_contiguous():  # all of it: no copy, no memory
            read_chunk(path, chunk, target, name)
            continue
        whole = read_chunk(path, chunk, torch.empty(chunk.shape, dtype=target.dtype), name)
        for _, _, target, window in parts:
            target.copy_(whole[window])


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
                values = torch.empty(chunk.shape, dtype=whole.dtype)
                part = read_chunk(self.folder / chunk.file, chunk, values, name)
            whole[_window(chunk.offsets, chunk.shape, [0] * whole.dim())] = part
        return whole


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> dict[str, str]:
    """Write whole tensors, one after another, as files of at most `limit` bytes and an index. Returns every file's
    SHA-256."""
    index, digests = {}, {}
    for number, group in enumerate(in_files(tensors, limit)):
        parts = {name: ([0] * tensor.dim(), tensor) for name, tensor in group.items()}
        path = folder / f"shard-{number:05d}.safetensors"
        chunks, digests[path.name] = _write(parts, path)
        for name, chunk in chunks.items():
            index[name] = _entry(group[name].dtype, group[name].shape, [chunk])
    return digests | _write_index(folder, index)


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


def read_chunk(path: Location, chunk: Chunk, values: Tensor, name: str) -> Tensor:
    """Fill a contiguous tensor of the CPU with one chunk's values, and return it. Raises DamagedError, or
    UnreadableError."""
    data = _bytes_of(values)
    with reading(path), path.open("rb") as file:
        file.seek(chunk.begin)
        count = file.readinto(data)
    # beside the file's SHA-256 (store.problems), which another rank may have computed, of what that one has read
    if count != chunk.bytes or zlib.crc32(data) != chunk.crc32:
        raise DamagedError(f"{path}: the part of {name} at byte {chunk.begin} is not what was written")
    return values


def digest(path: Location) -> str:
    """Return the SHA-256 of a file. Raises DamagedError, or UnreadableError."""
    sha256, hashed = hashlib.sha256(), None
    # two small blocks in turns: one is read while the other is hashed, and memory for the file is slower than both
    block, other = (memoryview(bytearray(BLOCK)) for _ in range(2))
    with reading(path), path.open("rb") as file, ThreadPoolExecutor(1) as hashing:
        while count := file.readinto(block):
            if hashed:
                hashed.result()  # the other block is free again
            hashed = hashing.submit(sha256.update, block[:count])
            block, other = other, block
    return sha256.hexdigest()


def write_synced(target: Path, text: str) -> dict[str, str]:
    """Write a file that survives a power cut, once its folder is synced too. Returns its SHA-256, by its name, of what
    was in memory."""
    data = text.encode()
    with target.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {target.name: hashlib.sha256(data).hexdigest()}


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk, to survive a power cut."""
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
        for other in near:
            ends = zip(other.offsets, other.shape, chunk.offsets, chunk.shape, strict=True)
            if chunk.bytes and all(a < b + width and b < a + length for a, length, b, width in ends):
                raise ValueError(f"{name} has a part twice: {chunk}")
        near.append(chunk)
    # none overlaps and none reaches outside: they cover it if they have as many values
    if sum(math.prod(chunk.shape) for chunk in tensor["chunks"]) != math.prod(shape):
        raise ValueError(f"the parts of {name} do not make it whole")


def _write(parts: Mapping[str, tuple[Sequence[int], Tensor]], path: Path) -> tuple[dict[str, Chunk], str]:
    """Write parts of tensors (key -> offsets, contiguous values) as a safetensors file, synced. Returns the chunks, and
    the file's SHA-256."""
    types = list(SAFETENSORS)  # as the library orders them, so that every value is aligned
    order = sorted(parts, key=lambda key: (types.index(parts[key][1].dtype), key))
    buffers = [_bytes_of(parts[key][1]) for key in order]
    ends = list(accumulate(map(len, buffers)))
    entries = {}
    for key, buffer, end in zip(order, buffers, ends, strict=True):
        values = parts[key][1]
        where = {"shape": list(values.shape), "data_offsets": [end - len(buffer), end]}
        entries[key] = {"dtype": SAFETENSORS[values.dtype], **where}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header

    def sha256_of_all() -> str:
        sha256 = hashlib.sha256(head)
        for buffer in buffers:
            sha256.update(buffer)
        return sha256.hexdigest()

    # of what is in memory, not of what the disk gives back: what changes on the way there must show
    with ThreadPoolExecutor(2) as sums, path.open("wb") as file:
        sha256, crcs = sums.submit(sha256_of_all), sums.map(zlib.crc32, buffers)
        file.write(head)
        for buffer in buffers:
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())
    chunks = {}
    for key, buffer, end, crc32 in zip(order, buffers, ends, crcs, strict=True):
        offsets, values = parts[key]
        begin = len(head) + end - len(buffer)
        chunks[key] = Chunk(list(offsets), list(values.shape), path.name, begin, len(buffer), crc32)
    return chunks, sha256.result()


def _bytes_of(values: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of the CPU."""
    return values.view(-1).view(torch.uint8).numpy().data


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


def _key(name: str, tensor: Tensor, offsets: Sequence[int], values: Tensor) -> str:
    """Return the name in a file of a part of a tensor: the tensor's, with the offsets where it is not all of it."""
    return name if values.shape == tensor.shape else f"{name}@{','.join(map(str, offsets))}"


def _entry(dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Return the index's entry of a tensor."""
    return {"dtype": str(dtype), "shape": list(shape), "chunks": [asdict(chunk) for chunk in chunks]}


def _write_index(folder: Path, tensors: Mapping[str, Any]) -> dict[str, str]:
    return write_synced(folder / INDEX, json.dumps({"tensors": tensors}, indent=0))


def _window(starts: Sequence[int], lengths: Sequence[int], offsets: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices of a region of a tensor in a part of it that begins at these offsets."""
    begins = [start - offset for start, offset in zip(starts, offsets, strict=True)]
    return tuple(slice(begin, begin + length) for begin, length in zip(begins, lengths, strict=True))
