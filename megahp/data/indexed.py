"""Tokenized documents on disk, in Megatron-LM's format: `PREFIX.bin` and `PREFIX.idx`.

`.bin` holds the token ids back to back. `.idx`, little-endian:

    9 bytes     "MMIDIDX\\0\\0"
    u64         version, 1
    u8          dtype code of the ids
    u64         S, the number of sequences
    u64         D, the number of documents + 1
    i32[S]      tokens of each sequence
    i64[S]      byte offset of each sequence in .bin
    i64[D]      first sequence of each document; the last entry is S
    i8[S]       modes; only in multimodal files, ignored here

We write one sequence per document and read any number.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megahp.errors import REMEDIES, UserError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20  # bytes of a write buffer, and entries of an index or ids processed at a time, to bound memory
STRETCHES, STRETCH = 64, 4096  # of the data in a fingerprint, and bytes of each

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype in which Megatron stores ids of this vocabulary: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class UnreadableDataError(UserError):
    """Data that the system does not read now, and perhaps later."""

    may_pass = True


class IndexedWriter:
    """Writes documents one by one; both files appear under their names when the `with` block succeeds.

    Until then they are in the folder PREFIX.unfinished. Nothing is left of it when the block raises UserError, unless
    `save` was called. `mark` ties all that was added to a state of the caller's; a signal, and any other error, saves
    the last mark. With `resume` a later writer goes on there: `state` is that state, or {} if there is none.

    largest: the largest id written, -1 before the first. Memory is 4 bytes per document. Raises UserError if the files
    exist and `overwrite` is false.
    """

    def __init__(self, prefix: str, vocab_size: int, overwrite: bool = False, resume: bool = False) -> None:
        self._prefix, self._vocab_size, self._dtype = prefix, vocab_size, token_dtype(vocab_size)
        self._lengths = array("i")
        self._is_open = False  # whether the last document goes on
        self._folder = Path(f"{prefix}.unfinished")
        self._mark: dict[str, Any] = {}
        self._saved = 0  # documents in the file of lengths
        self.state: dict[str, Any] = {}
        self.largest = -1
        self._output = self._open(overwrite, resume)

    def add_document(self, ids: Ids, goes_on: bool = False) -> None:
        """Append one document of `ids` (integers in [0, vocab_size), else UserError), or more of one that `goes_on`."""
        array = np.asarray(ids, None if isinstance(ids, np.ndarray) else np.int64)
        least, largest = (int(array.min()), int(array.max())) if array.size else (0, -1)
        if least < 0 or largest >= self._vocab_size:
            raise UserError(
                f"{self._prefix!r}: document {len(self._lengths)} has ids {least} to {largest}, "
                f"outside a vocabulary of {self._vocab_size}; give the vocab_size of the tokenizer"
            )
        size = array.size + (self._lengths.pop() if self._is_open else 0)
        if size >= 2**31:
            raise UserError(f"{self._prefix!r}: a document has {size} tokens; split it below 2^31")
        self.largest = max(self.largest, largest)
        self._bin.write(array.astype(self._dtype).data)
        self._lengths.append(size)
        self._is_open = goes_on

    def mark(self, state: dict[str, Any]) -> None:
        """Tie what was added to a state, JSON, which must not change afterwards. Nothing while a document goes on."""
        if not self._is_open:
            written = {"documents": len(self._lengths), "bytes": self._bin.tell(), "largest": self.largest}
            self._mark = {"state": state, **written}

    def save(self) -> None:
        """Keep the last mark for a later writer, whatever happens to this one. Raises OSError."""
        if not self._mark:
            return
        self._bin.flush()
        self._lengths[self._saved : self._mark["documents"]].tofile(self._kept)
        self._kept.flush()
        for file in (self._bin, self._kept):
            os.fsync(file.fileno())
        partial = self._folder / "state.part"
        partial.write_text(json.dumps(self._mark), encoding="utf-8")
        partial.replace(self._folder / "state")
        self._saved = self._mark["documents"]

    def restart(self) -> None:
        """Drop what was saved."""
        (self._folder / "state").unlink(missing_ok=True)
        self._lengths, self._saved, self._mark, self.state, self.largest = array("i"), 0, {}, {}, -1
        for file in (self._bin, self._kept):
            file.truncate(0)
            file.seek(0)

    def __enter__(self) -> IndexedWriter:
        return self._output.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._output.__exit__(*raised)

    @contextmanager
    def _open(self, overwrite: bool, resume: bool) -> Iterator[IndexedWriter]:
        """Open the folder, whose files are renamed on success."""
        names, folder = [Path(f"{self._prefix}.{suffix}") for suffix in ("bin", "idx")], self._folder
        for name in names:
            if name.exists() and not overwrite:
                raise UserError(f"output {str(name)!r} exists; choose another or pass --overwrite")
        try:
            if folder.exists() and not (folder / "lock").exists():
                raise UserError(f"{str(folder)!r} is not of megahp; choose another output, or remove it")
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "a") as lock:
                _lock(lock, self._prefix)
                try:
                    yield from self._write(resume)
                    # An old index beside new data could pass as valid: it is removed first, and the new one comes last.
                    names[1].unlink(missing_ok=True)
                    for name in names:
                        (folder / name.suffix[1:]).replace(name)
                    (folder / "state").unlink(missing_ok=True)
                finally:
                    if not (folder / "state").exists():
                        shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            why = f"output {self._prefix!r} cannot be written ({error})"
            raise UserError(f"{why}; free some space or choose another") from error

    def _write(self, resume: bool) -> Iterator[IndexedWriter]:
        folder = self._folder
        with open(folder / "bin", "a+b", BLOCK) as self._bin, open(folder / "lengths", "a+b") as self._kept:
            if not (resume and self._restore()):
                self.restart()
            try:
                yield self
            except UserError:
                raise
            except BaseException:  # a signal too
                with suppress(OSError):  # perhaps this is the disk that is full
                    self.save()
                raise
        with open(folder / "idx", "wb", BLOCK) as idx:
            for part in _index(self._dtype, np.array(self._lengths, np.int32)):
                idx.write(part)

    def _restore(self) -> bool:
        """Go back to what was saved, and return whether there is anything, and whole."""
        try:
            saved = json.loads((self._folder / "state").read_text(encoding="utf-8"))
            state, documents, size = dict(saved["state"]), int(saved["documents"]), int(saved["bytes"])
            lengths = np.fromfile(self._folder / "lengths", np.int32, documents)
            largest = int(saved["largest"])
            is_whole = len(lengths) == documents and int(lengths.sum(dtype=np.int64)) * self._dtype.itemsize == size
            if not is_whole or os.fstat(self._bin.fileno()).st_size < size:
                return False
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return False
        self._lengths, self._saved, self.largest = array("i", lengths.tobytes()), documents, largest
        self._mark, self.state = saved, state
        for file, end in ((self._bin, size), (self._kept, 4 * documents)):
            file.truncate(end)
            file.seek(end)
        return True


def _lock(file: IO[str], prefix: str) -> None:
    """Lock the output until this process ends or closes the file. Raises UserError when it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"output {prefix!r} is being written by another process; wait for it or choose another"
        ) from None
    except OSError:  # a file system without locks
        pass


def _index(dtype: np.dtype[Any], lengths: np.ndarray) -> Iterator[bytes | memoryview]:
    """Yield the content of .idx for documents of one sequence each. lengths: int32 [documents], in tokens."""
    yield HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(lengths) + 1)
    yield lengths.astype("<i4", copy=False).data
    offset = 0
    for block in _blocks(len(lengths)):
        ends = offset + np.cumsum(lengths[block], dtype=np.int64)
        yield ((ends - lengths[block]) * dtype.itemsize).astype("<i8").data
        offset = int(ends[-1])
    yield np.arange(len(lengths) + 1, dtype="<i8").data


@dataclass(frozen=True)
class Identity:
    """What tells corpora apart: equal files have an equal one under any path. It does not cover every byte.

    fingerprint: hash of the index, the size of the data, and 64 evenly spaced stretches of 4 KiB of it.
    index: hash of the index alone.
    stretches: 4 hexadecimal digits of a hash of each stretch, cut so that none overlaps the next.
    """

    fingerprint: str
    index: str
    stretches: str

    def likeness(self, before: Mapping[str, str]) -> int:
        """Return how many stretches are those of an older identity; 0 with another index, or where they are fewer than
        half. Otherwise it is the same corpus, equal or with some tokens replaced."""
        equal = sum(a == b for a, b in zip(*map(_quarters, (self.stretches, before["stretches"])), strict=False))
        return equal if self.index == before["index"] and 2 * equal >= STRETCHES else 0


class IndexedDataset:
    """The documents under `prefix`. The index is memory-mapped, so that all processes of a machine share it; ids are
    read as they are asked for.

    documents, total_tokens: how many there are.
    fingerprint: that of `identity`, or of an older identity which a run knows the corpus by.

    Raises UserError, naming the file, if either file is missing or they do not fit together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        idx, self._bin = _existing(prefix, "idx"), _existing(prefix, "bin")
        try:
            # Not mapped: a disk that fails, or a file cut short, would then end the process without a word.
            self._descriptor = os.open(self._bin, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            size = self._bin.stat().st_size
            self.identity = self._identify(idx, size)  # reads all of the index, before it is mapped
            self.dtype, expected, self._offsets, self._document_index = _read_index(idx)
        except OSError as error:
            raise _unreadable(Path(error.filename or self._bin), error) from error
        if size != expected:
            raise _corrupt(self._bin, f"it has {size} bytes but the index describes {expected}")
        self.fingerprint = self.identity.fingerprint
        self.documents, self.total_tokens = len(self._document_index) - 1, size // self.dtype.itemsize

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """Return where these documents begin in the data (int64, in tokens); its end for one after the last."""
        sequences = self._document_index[documents]
        starts = self._offsets[sequences] // self.dtype.itemsize
        return np.where(sequences == self._document_index[-1], self.total_tokens, starts)

    def _start(self, document: int) -> int:
        """Return where a document begins, in a tenth of the time that `document_starts` takes for one."""
        sequence = self._document_index[document]
        is_end = sequence == self._document_index[-1]
        return self.total_tokens if is_end else int(self._offsets[sequence]) // self.dtype.itemsize

    def document_tokens(self, documents: np.ndarray) -> np.ndarray:
        """Return how many tokens these documents have (int64)."""
        return self.document_starts(documents + 1) - self.document_starts(documents)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return ids [start, stop) of a document as stored (dtype of the file). Raises UserError."""
        first, end = self._start(document), self._start(document + 1)  # its sequences lie back to back
        stop = end - first if stop is None else min(stop, end - first)
        return self._read(first + start, max(start, stop) - start)

    def outside(self, vocab_size: int, most: int) -> np.ndarray:
        """Return the first documents, up to `most` (int64, ascending), that hold an id outside [0, vocab_size), by a
        scan of all data. Raises UserError."""
        found, total = list[int](), self.total_tokens
        for first in range(0, total, BLOCK):
            ids = self._read(first, min(BLOCK, total - first))
            places = first + np.flatnonzero((ids < 0) | (ids >= vocab_size))
            while len(places):
                document = self._document_at(int(places[0]))
                found += [document] if document not in found[-1:] else []
                places = places[places >= self._start(document + 1)]
            if len(found) >= most:
                break
        return np.array(found[:most], np.int64)

    def problem(self, vocab_size: int, document: int, start: int = 0, stop: int | None = None) -> str:
        """Return the first id outside [0, vocab_size) of ids [start, stop) of a document, and where it is, for a
        message; "" if there is none. Raises UserError."""
        ids = self.tokens(document, start, stop)
        places = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if not len(places):
            return ""
        where = f"data {self.prefix!r} holds token {ids[places[0]]} in document {document}, at its place"
        return f"{where} {start + places[0]}, but the vocabulary ends at {vocab_size}"

    @property
    def modified(self) -> int:
        """When the data was last written, in nanoseconds since 1970."""
        return self._bin.stat().st_mtime_ns

    def _read(self, first: int, count: int) -> np.ndarray:
        """Return `count` ids from place `first` of the data on."""
        start, size, content = first * self.dtype.itemsize, count * self.dtype.itemsize, b""
        try:  # one read ends at 2 GiB
            while part := os.pread(self._descriptor, size - len(content), start + len(content)):
                content += part
        except OSError as error:
            raise _unreadable(self._bin, error, f"document {self._document_at(first)} of ") from error
        if len(content) < size:
            raise _corrupt(self._bin, f"it has fewer than the {start + size} bytes that it had when it was opened")
        return np.frombuffer(content, self.dtype.newbyteorder("<")).astype(self.dtype, copy=False)

    def _document_at(self, place: int) -> int:
        """Return the document that a token of the data is in."""
        # not np.searchsorted, which copies all of an array whose numbers are not aligned
        sequence = bisect_right(self._offsets[:-1], place * self.dtype.itemsize) - 1
        return bisect_right(self._document_index, sequence) - 1

    def _identify(self, idx: Path, size: int) -> Identity:
        """Return the identity of these files. Raises OSError."""
        with open(idx, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        index, stretches = digest.hexdigest(), ""
        digest.update(str(size).encode())
        for stretch in range(STRETCHES):  # all of it would take hours for a large corpus, at every start
            content = os.pread(self._descriptor, STRETCH, size * stretch // STRETCHES)
            digest.update(content)
            stretches += hashlib.sha256(content[: max(1, size // STRETCHES)]).hexdigest()[:4]
        return Identity(digest.hexdigest(), index, stretches)


def _quarters(stretches: str) -> list[str]:
    return [stretches[place : place + 4] for place in range(0, len(stretches), 4)]


def _read_index(idx: Path) -> tuple[np.dtype[Any], int, np.ndarray, np.ndarray]:
    """Return the ids' dtype, the bytes of .bin, and byte offsets and document index, memory-mapped. Raises UserError.

    The offset of each sequence is followed by a number that is none. Everything is checked here: a wrong offset would
    otherwise train silently on other tokens.
    """
    size = idx.stat().st_size
    if size < HEADER.size:
        raise _corrupt(idx, f"it has {size} bytes, fewer than a header")
    with open(idx, "rb") as file:
        magic, version, code, sequences, entries = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise _corrupt(idx, f"it starts with {magic!r} instead of {MAGIC!r}")
    if version != 1:
        raise _corrupt(idx, f"its version is {version} instead of 1")
    if code not in DTYPES:
        raise _corrupt(idx, f"its dtype code {code} is not an integer type")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if size not in (expected, expected + sequences):  # the latter with modes
        raise _corrupt(idx, f"it has {size} bytes but {sequences} sequences need {expected}")
    if entries < 1:
        raise _corrupt(idx, "its document index is empty")

    dtype = np.dtype(DTYPES[code])
    with open(idx, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    offsets = np.frombuffer(content, "<i8", sequences + 1, HEADER.size + 4 * sequences)  # and the first of the next
    document_index = np.frombuffer(content, "<i8", entries, HEADER.size + 12 * sequences)
    if document_index[0] != 0 or document_index[-1] != sequences:
        raise _corrupt(idx, f"its document index does not run from 0 to {sequences}")
    for block in _mapped_blocks(entries, content):
        if (np.diff(document_index[block.start : block.stop + 1]) < 0).any():
            raise _corrupt(idx, "its document index is not ascending")
    offset = 0
    for block in _mapped_blocks(sequences, content):
        if lengths[block].min() < 0:
            raise _corrupt(idx, "a sequence has a negative length")
        ends = offset + np.cumsum(lengths[block], dtype=np.int64) * dtype.itemsize
        if (offsets[:-1][block] != np.concatenate([[offset], ends[:-1]])).any():
            raise _corrupt(idx, "its sequences do not lie back to back")
        offset = int(ends[-1])
    return dtype, offset, offsets, document_index


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, length, BLOCK))


def _mapped_blocks(length: int, content: mmap.mmap) -> Iterator[slice]:
    """Yield blocks, and let the pages go that each was checked in: they would count as this process's memory."""
    for block in _blocks(length):
        yield block
        content.madvise(mmap.MADV_DONTNEED)


def _existing(prefix: str, suffix: str) -> Path:
    path = Path(f"{prefix}.{suffix}")
    if not path.is_file():
        there = "" if path.is_absolute() else f" in the working folder {os.getcwd()}"
        raise UserError(
            f"data file {str(path)!r} does not exist{there}; check the prefix, or write it with megahp preprocess"
        )
    return path


def _unreadable(path: Path, error: OSError, part: str = "") -> UserError:
    elsewhere = "try again, copy the file from elsewhere, or leave the document out with data.skip"
    remedy = REMEDIES.get(error.errno or 0, elsewhere)
    return UnreadableDataError(f"{part}data file {str(path)!r} cannot be read ({error.strerror}); {remedy}")


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"data file {str(path)!r} is corrupt, {reason}; write it again with megahp preprocess")
