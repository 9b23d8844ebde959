"""Find the files of an input, tell what each holds from its content and name, and read its documents in pieces."""

import bz2
import codecs
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from megahp.errors import UserError
from megahp.files import refuse_irregular

FORMATS = ("auto", "text", "json")
RECORDS = (".jsonl", ".ndjson", ".jl", ".parquet", ".arrow")  # names of files that hold records, a document each
COLUMNS = (".parquet", ".arrow", ".feather")
JSON = (".json", ".jsonl", ".ndjson", ".jl")
TABLES = (".csv", ".tsv")  # records that are not read, and would pass for text
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")

HEAD = 1 << 16  # bytes from which a file's kind is told
BLOCK = 1 << 20  # bytes of text read at a time
PIECE_CHARACTERS = 1 << 18  # of a document that are tokenized at a time
EMPTY = "empty"  # the one reason to leave out a document that does not make it a bad one
# UTF-16 and 32 begin with these; the names of a record's fields are strings, so a text that begins thus is rather JSON
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
RECORD, ARRAY = re.compile(rb'\s*(\[\s*)?\{\s*"'), re.compile(rb"\s*\[\s*(\{|\]\s*\Z)")

LeftOut = dict[str, tuple[int, str]]  # reason -> how many, and where the first is
Record = tuple[int, Any, str]  # its line or row from 1, what was read, and else what is wrong with it


class Piece(NamedTuple):
    """A document of the input, or a part of a long one.

    file: index of its source. number: from 1 in the file; of a record the line or row.
    text: valid Unicode; None for a bad document, of which no other piece is yielded.
    read: bytes of the file, as stored, that have been read.
    begins, ends: whether it is the document's first and last. fault: why the document is bad.
    """

    file: int
    number: int
    text: str | None
    read: int
    begins: bool = True
    ends: bool = True
    fault: str = ""


@dataclass(frozen=True)
class Source:
    """A file of the input.

    name: for messages. kind: see `_kind`. version: changes with its content. fault: why none of it can be read.
    identity: equal for a file's names; size and time too, since some file systems reuse an inode's number.
    handle: of a copy of standard input, which is deleted when it is closed.
    """

    path: Path
    name: str
    kind: str
    size: int
    version: str
    is_compressed: bool = False
    fault: str = ""
    identity: object = None
    handle: IO[bytes] | None = None

    def place(self, number: int) -> str:
        """Return where a document is, for a message."""
        return self.name if self.kind == "text" or self.fault else f"{self.name}:{number}"


def note(left_out: LeftOut, reason: str, place: object) -> None:
    """Count something left out. place: file, or file:line, of whose name all can be printed."""
    count, first = left_out.get(reason, (0, repr(str(place))[1:-1]))
    left_out[reason] = count + 1, first


def check_share(left_out: LeftOut, documents: int, most_bad: float) -> None:
    """Raise UserError if more than `most_bad` of the documents, good and bad, are bad. left_out: of bad documents."""
    bad = sum(count for reason, (count, _) in left_out.items() if reason != EMPTY)
    if bad > most_bad * (documents + bad):
        first = next(f"{place}: {reason}" for reason, (_, place) in left_out.items() if reason != EMPTY)
        raise UserError(
            f"{bad} of {documents + bad} documents are bad, above --most-bad {most_bad:g}, the first at {first}; "
            "correct the input, or raise --most-bad"
        )


def check_key(sources: Sequence[Source], key: str) -> None:
    """Raise UserError for a --json-key that was given and that no file has a use for."""
    if key != "text" and all(source.kind == "text" for source in sources):
        raise UserError(f"--json-key {key!r} is for JSON, Parquet or Arrow, and all files are text; omit it")


def find_sources(
    inputs: Sequence[str], extensions: Sequence[str], exclude: Sequence[str], form: str, scratch: Path | None = None
) -> tuple[list[Source], LeftOut]:
    """Return the files of the inputs in order, those of a folder sorted by path, and what of the folders is left out.

    exclude: names of folders to skip, at any depth. form: one of FORMATS. scratch: folder that can hold a copy of
    standard input ("-"). Raises UserError for a file whose kind cannot be told, and if there are none.
    """
    endings = tuple(f".{extension.lstrip('.').lower()}" for extension in extensions)
    sources: list[Source] = []
    left_out: LeftOut = {}
    seen = set[object]()
    for name in inputs:
        path, is_folder = Path(name), os.path.isdir(name)
        if not path.exists() and name != "-":
            raise UserError(f"--input {name!r} does not exist; check the path")
        found = _files(path, endings, exclude, left_out) if is_folder else [path]
        if not found:
            raise UserError(f"--input {name!r} holds no {' '.join(endings)} files; see --extensions")
        for file in found:
            source = inspect(file, form, not is_folder, scratch)
            if source.identity in seen:
                note(left_out, "the same file as another", file)
            else:
                sources.append(source)
                seen |= set() if source.fault else {source.identity}
    return sources, left_out


def _files(folder: Path, endings: tuple[str, ...], exclude: Sequence[str], left_out: LeftOut) -> list[Path]:
    """Return the files of a folder that have one of these endings, before that of a compression too."""
    files = []

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed would be left out unseen

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in sorted(set(folders)):
            path = Path(parent, name)
            reason = "a hidden folder" if name.startswith(".") else "a link to a folder" if path.is_symlink() else ""
            if reason and name not in exclude:
                note(left_out, reason, path)
            if reason or name in exclude:
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not (name.lower().endswith(endings) or _bare(name).endswith(endings)):
                note(left_out, "another ending, see --extensions", path)
            elif name.startswith("."):
                note(left_out, "a hidden file", path)
            elif not path.is_file() and path.exists():
                note(left_out, "no regular file", path)
            else:
                files.append(path)
    return sorted(files)


def _bare(name: str) -> str:
    """Return a file's name in lower case, without the ending of a compression."""
    return name.lower().removesuffix(next((end for end in COMPRESSIONS if name.lower().endswith(end)), ""))


def inspect(file: Path, form: str = "auto", is_named: bool = True, scratch: Path | None = None) -> Source:
    """Tell what a file holds. is_named: it was named itself, so that it is refused if it is no text at all.

    Standard input is copied to disk, which needs no memory and can be read twice, in a file without a name to leave.
    Raises UserError for a file that cannot be read, and for one that could be of several kinds.
    """
    if not is_named and file.is_symlink() and not file.exists():
        return Source(file, str(file), "text", 0, "", fault="a link to nothing")
    handle, digest = None, hashlib.sha256()
    if str(file) == "-":
        handle = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        with open(0, "rb", closefd=False) as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                handle.write(block)
        handle.flush()
    path = Path(f"/dev/fd/{handle.fileno()}") if handle else file
    kind, fault = "", ""
    with _opened(path, str(file), None) as (raw, stream):
        head, is_compressed, status = stream.read(HEAD), raw is not stream, os.fstat(raw.fileno())
        try:
            kind = _kind(head, file.name, form, is_compressed)
        except UserError as error:
            raise UserError(f"{str(file)!r} {error}") from None
        except ValueError as error:  # holds no text
            fault = str(error)
    if fault and is_named:
        raise UserError(f"{str(file)!r} is {fault}; convert it to UTF-8 text, or remove it")
    version = digest.hexdigest() if handle else str(status.st_mtime_ns)
    identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return Source(path, str(file), kind, status.st_size, version, is_compressed, fault, identity, handle)


def _kind(head: bytes, name: str, form: str, is_compressed: bool) -> str:
    """Return "text", "lines" or "array" of JSON records, "parquet", "arrow" (file) or "stream" (of Arrow).

    Raises ValueError for what is no text, and UserError for what may be text or not.
    """
    magics = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "stream"}
    if not is_compressed and name.lower().endswith(COMPRESSIONS):
        raise UserError("is named as compressed, and is not; fetch it again, or rename it")
    if not head:
        return "text"  # which is then counted as empty
    name = _bare(name)
    if columns := next((kind for magic, kind in magics.items() if head.startswith(magic)), ""):
        if is_compressed:
            raise UserError("is compressed around its own compression; decompress it")
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError("needs the package 'pyarrow'; pip install pyarrow")
        return columns
    if head.startswith(b"version https://git-lfs"):
        raise UserError("is a pointer of Git LFS; fetch the file with git lfs pull")
    if name.endswith(COLUMNS):
        raise UserError("holds no data of Parquet or Arrow, as its name says; fetch it again, or rename it")
    if head.startswith(WIDE):
        raise ValueError("UTF-16 or UTF-32")
    body = head.removeprefix(codecs.BOM_UTF8)
    is_json = form == "json" or (form == "auto" and (name.endswith(JSON) or RECORD.match(body)))
    if is_json and (b"\0" not in head or RECORD.match(body)):  # a crash leaves NULs in lines that are good otherwise
        lines = body.split(b"\n")
        whole = [line for line in (lines[:-1] if len(head) == HEAD else lines) if line.strip()]
        if ARRAY.match(body):
            return "array"
        is_long = not whole and RECORD.match(body)  # a first line of more than HEAD bytes
        if form == "json" or name.endswith(JSON[1:]) or any(map(_is_record, whole)) or is_long or not body.strip():
            return "lines"
        raise UserError("is JSON, but neither lines nor an array of records; convert it, or say --format text")
    if b"\0" in head:
        raise ValueError("binary")
    if form == "auto" and name.endswith(TABLES):
        raise UserError("is a table, which is not read; convert it to JSON lines, or say --format text")
    return "text"


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class Zstandard(io.RawIOBase):
    """The content of a zstandard file. Raises EOFError for a damaged or truncated one.

    It is decompressed frame by frame, since the library's own stream reader accepts a truncated file as complete.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError("reading .zst files needs the package 'zstandard'; pip install zstandard") from error
        self._raw, self._error = raw, zstandard.ZstdError
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._stored, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._content:
            self._stored = self._stored or self._raw.read(1 << 14)  # may become many times as much
            if not self._stored:
                if self._frame is not None:
                    raise EOFError("it is truncated")
                return 0
            self._frame = self._frame or self._start()
            try:
                self._content = memoryview(self._frame.decompress(self._stored))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._stored, self._frame = (self._frame.unused_data, None) if self._frame.eof else (b"", self._frame)
        size = min(len(target), len(self._content))
        target[:size], self._content = self._content[:size], self._content[size:]
        return size


# what a compressed file begins with, and how its content is read
OPENERS: dict[re.Pattern[bytes], Any] = {
    re.compile(rb"\x1f\x8b"): lambda raw: gzip.GzipFile(fileobj=raw),
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.BZ2File,
    re.compile(rb"\xfd7zXZ\0"): lzma.LZMAFile,
    re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"): Zstandard,
}


@contextmanager
def _opened(path: Path, name: str, is_compressed: bool | None) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield a file as stored, whose tell() says how much was read, and its content, decompressed.

    is_compressed: None if that is to be found out. Raises UserError for what the block finds damaged or truncated.
    """
    try:
        if is_compressed is None:
            refuse_irregular(path, "text", "name another, or fetch it again")
        with open(path, "rb") as raw:
            start = b"" if is_compressed is False else raw.peek(16)
            opener = next((opener for magic, opener in OPENERS.items() if magic.match(start)), None) if start else None
            yield raw, io.BufferedReader(opener(raw), HEAD) if opener else raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{name!r} cannot be read ({error}); fetch it again or remove it") from error


def read_pieces(sources: Iterable[Source], key: str, after: tuple[int, int] = (0, 0)) -> Iterator[Piece]:
    """Yield the pieces of the documents in order, those after a file and number alone.

    key: of a record's text. Raises UserError for a file that cannot be read or decompressed, or has no such key.
    """
    for file, source in islice(enumerate(sources), after[0], None):
        skipped = after[1] if file == after[0] else 0
        pieces = _read_text(file, source) if source.kind == "text" or source.fault else _read_records(file, source, key)
        yield from (piece for piece in pieces if piece.number > skipped)


def _read_text(file: int, source: Source) -> Iterator[Piece]:
    """Yield the pieces of a file of text; if any of it is not UTF-8, one bad document."""
    try:
        if source.fault:
            raise ValueError(source.fault)
        if source.size > 2 * PIECE_CHARACTERS or source.is_compressed:
            for _ in _decoded(source):  # a fault at the end leaves out the first piece too
                pass
        number, text, start = 0, "", 0
        for block, read in _decoded(source):
            text, start = text[start:] + block, 0
            while len(text) - start > 2 * PIECE_CHARACTERS:
                number, stop = number + 1, _end_of_piece(text, start)
                yield Piece(file, number, text[start:stop], read, number == 1, ends=False)
                start = stop
        last = list(split_text(text[start:])) or [""]
        for each, piece in enumerate(last, 1):
            yield Piece(file, number + each, piece, source.size, number + each == 1, each == len(last))
    except ValueError as error:
        fault = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        yield Piece(file, 1, None, source.size, fault=fault)


def _decoded(source: Source) -> Iterator[tuple[str, int]]:
    """Yield the text of a file, block by block, and how much of the file was read. Raises ValueError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with _opened(source.path, source.name, source.is_compressed) as (raw, stream):
        for block in iter(partial(stream.read, BLOCK), b""):
            if b"\0" in block:
                raise ValueError("binary")
            yield decoder.decode(block), raw.tell()
    yield decoder.decode(b"", final=True), source.size


def split_text(text: str) -> Iterator[str]:
    """Cut a text after a newline about every PIECE_CHARACTERS: tokenizers need many times a text's memory.

    The tokens are those of the whole text if no token spans a newline (`encode_part`), as in a tokenizer trained here.
    """
    start = 0
    while start < len(text):
        stop = _end_of_piece(text, start)
        yield text[start:stop]
        start = stop


def _end_of_piece(text: str, start: int) -> int:
    newline = text.find("\n", start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
    return newline + 1 if newline >= 0 else start + 2 * PIECE_CHARACTERS


def _read_records(file: int, source: Source, key: str) -> Iterator[Piece]:
    readers = {"lines": _json_lines, "array": _json_array}
    is_first = True
    with _opened(source.path, source.name, source.is_compressed) as (raw, stream):
        try:
            for number, record, fault in readers.get(source.kind, partial(_columns, source, key))(stream):
                # A wrong --json-key is reported at the first record, not after hours.
                if is_first and isinstance(record, dict) and key not in record:
                    has = repr(", ".join(map(str, record)))[1:-1]
                    remedy = "choose one, or say --format text"
                    raise UserError(f"--json-key {key!r} is not in {source.name!r}, which has {has}; {remedy}")
                is_first = is_first and not isinstance(record, dict)
                text: Any = record.get(key) if isinstance(record, dict) else None
                if not fault and not isinstance(text, str):
                    fault = f"no text in {key!r}"
                elif not fault and not text.isascii() and not _is_unicode(text):
                    fault = "half a surrogate pair"
                yield Piece(file, number, None if fault else text, raw.tell(), fault=fault)
        except (ValueError, RecursionError) as error:  # after which no record can be found
            why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            raise UserError(f"{source.name!r} cannot be read ({why}); correct it or remove it") from error


def _is_unicode(text: str) -> bool:
    """Return whether a text can be UTF-8: JSON can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(stream: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            record, fault = None, ""
            try:
                record = json.loads(line)
            except ValueError:
                fault = "no JSON"
            except RecursionError:  # a line of 1,000 nested lists
                fault = "JSON nested too deeply"
            yield number, record, fault


def _json_array(stream: IO[bytes]) -> Iterator[Record]:
    """Yield the elements of a JSON array, of which memory holds a few. Raises ValueError for what is no JSON."""
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    decode, buffer = json.JSONDecoder().raw_decode, text.read(BLOCK)
    number, at = 0, _after_spaces(buffer, buffer.index("[") + 1)
    mark = "]" if buffer.startswith("]", at) else ","
    at += mark == "]"
    while mark == ",":
        try:
            record, end = decode(buffer, _after_spaces(buffer, at))
            end = _after_spaces(buffer, end)
            if buffer[end : end + 1] not in (",", "]"):  # a number may go on past the buffer's end
                raise json.JSONDecodeError("Expecting ',' or ']'", buffer, end)
        except json.JSONDecodeError as error:
            # what is wrong far from the buffer's end is no record that is merely cut there
            is_cut = len(buffer) - error.pos < 100 or error.msg.startswith("Unterminated")
            if not is_cut or not (more := text.read(max(BLOCK, len(buffer) - at))):
                raise ValueError(f"record {number + 1}: {error.msg}") from None
            buffer, at = buffer[at:] + more, 0
            continue
        number, at, mark = number + 1, end + 1, buffer[end]
        yield number, record, ""
    if (buffer[at:] + text.read(BLOCK)).strip():
        raise ValueError("text follows the array")
    text.detach()


def _after_spaces(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _columns(source: Source, key: str, stream: IO[bytes]) -> Iterator[Record]:
    """Yield the rows' field `key` alone. Raises ValueError (which those of pyarrow are)."""
    from pyarrow import ArrowException, ipc, parquet  # an optional package

    try:
        if source.kind == "parquet":
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            batches = table.iter_batches(1024, columns=[key] if key in names else names[:0])
        elif source.kind == "arrow":
            table = ipc.open_file(stream)
            names, batches = table.schema.names, map(table.get_batch, range(table.num_record_batches))
        else:
            table = batches = ipc.open_stream(stream)
            names = table.schema.names
        if key not in names:
            yield 1, dict.fromkeys(names), ""
        parts = (batch.column(key).slice(at, 1024) for batch in batches for at in range(0, len(batch), 1024))
        for number, text in enumerate((text for part in parts for text in part.to_pylist()), 1):
            yield number, {key: text}, ""
    except ArrowException as error:
        raise ValueError(str(error)) from error


def read_texts(source: Source, key: str, most_bad: float) -> tuple[list[str], LeftOut]:
    """Return the whole texts of a file that are not empty, and what is left out. Raises UserError."""
    texts: list[str] = []
    left_out: LeftOut = {}
    parts: list[str] = []
    for piece in read_pieces([source], key):
        parts.append(piece.text or "")
        if piece.ends:
            if text := "".join(parts):
                texts.append(text)
            else:
                note(left_out, piece.fault or EMPTY, source.place(piece.number))
            parts = []
    check_share(left_out, len(texts), most_bad)
    return texts, left_out
