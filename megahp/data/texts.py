"""Documents out of text files, JSON lines and folders of them."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megahp.errors import UserError
from megahp.files import refuse_irregular

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class Document:
    """text: Unicode, or None where the input holds none. consumed: input bytes since the document before."""

    text: str | None
    consumed: int


def find_files(inputs: Sequence[str], extensions: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The files of the inputs in order, those of a folder sorted by path; UserError where there are none.

    exclude: names of folders inside a folder that are passed over.
    """
    endings = tuple(f".{extension.lstrip('.')}" for extension in extensions)
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"--input {str(path)!r} does not exist: check the path")
        inside = sorted(
            p
            for p in path.rglob("*")
            if p.name.endswith(endings) and p.is_file() and not set(p.relative_to(path).parts[:-1]) & set(exclude)
        )
        if path.is_dir() and not inside:
            raise UserError(f"--input {str(path)!r} holds no {' '.join(endings)} files: see --extensions")
        files += inside if path.is_dir() else [path]
    return files


def read_documents(files: Iterable[Path], json_key: str) -> Iterator[Document]:
    """The documents of the files, in order. Raises UserError where a file cannot be opened or unpacked."""
    for file in files:
        try:
            refuse_irregular(file, "text", "name another, or fetch it again")
            if file.name.endswith(JSON_LINES):
                yield from _read_json_lines(file, json_key)
            else:
                yield _read_text(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{str(file)!r} cannot be read ({error}): fetch it again or leave it out") from error


def _read_text(file: Path) -> Document:
    content = file.read_bytes()
    try:
        return Document(content.decode(), len(content))
    except UnicodeDecodeError:
        return Document(None, len(content))


def _read_json_lines(file: Path, key: str) -> Iterator[Document]:
    with open(file, "rb") as raw:
        before, lines = 0, iter(raw)
        if file.name.endswith(".gz"):
            lines = iter(gzip.GzipFile(fileobj=raw))
        elif file.name.endswith(".zst"):
            lines = _zstandard_lines(raw)
        for number, line in enumerate(lines):
            try:
                record = json.loads(line) if line.strip() else {key: ""}
            except (ValueError, RecursionError):
                record = None
            # A wrong --json-key shows in the first line, not after hours.
            if number == 0 and isinstance(record, dict) and key not in record:
                has = ", ".join(record)
                raise UserError(f"--json-key {key!r} is not in {str(file)!r}, which has {has}: choose one")
            text = record.get(key) if isinstance(record, dict) else None
            yield Document(text if isinstance(text, str) and _is_unicode(text) else None, raw.tell() - before)
            before = raw.tell()


def _zstandard_lines(raw: IO[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in _zstandard_blocks(raw):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zstandard_blocks(raw: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a file cut in the middle for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst files needs the package 'zstandard': pip install zstandard") from error
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while block := raw.read(1 << 17):
            while block:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("it ends in the middle")


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
