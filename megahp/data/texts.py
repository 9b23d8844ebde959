"""Read documents from text files, JSON-lines files and folders of them."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megahp.errors import UserError
from megahp.files import refuse_irregular

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON can hold but UTF-8 cannot


@dataclass(frozen=True)
class Document:
    """One document of the input.

    text: valid Unicode; None if the input is damaged there.
    consumed: input bytes since the previous document.
    """

    text: str | None
    consumed: int


def find_files(inputs: Sequence[str], extensions: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Return the files of the inputs in order, those of a folder sorted by path. Raises UserError if there are none.

    exclude: names of folders to skip, at any depth.
    """
    endings = tuple(f".{extension.lstrip('.')}" for extension in extensions)
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"--input {str(path)!r} does not exist; check the path")
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in path.rglob("*") if p.name.endswith(endings) and p.is_file()]
        inside = sorted(p for p in inside if not set(p.relative_to(path).parts[:-1]) & set(exclude))
        if not inside:
            raise UserError(f"--input {str(path)!r} holds no {' '.join(endings)} files; see --extensions")
        files += inside
    return files


def read_documents(files: Iterable[Path], json_key: str) -> Iterator[Document]:
    """Yield the documents of the files, in order. Raises UserError for a file that cannot be read or decompressed."""
    for file in files:
        try:
            refuse_irregular(file, "text", "name another, or fetch it again")
            if file.name.endswith(JSON_LINES):
                yield from _read_json_lines(file, json_key)
            else:
                content = file.read_bytes()
                try:
                    text: str | None = content.decode()
                except UnicodeDecodeError:
                    text = None
                yield Document(text, len(content))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{str(file)!r} cannot be read ({error}); fetch it again or remove it") from error


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
            except (ValueError, RecursionError):  # the latter for a line of 1,000 nested lists
                record = None
            # A wrong --json-key is reported at the first line, not after hours.
            if number == 0 and isinstance(record, dict) and key not in record:
                has = ", ".join(record)
                raise UserError(f"--json-key {key!r} is not in {str(file)!r}, which has {has}; choose one")
            text = record.get(key) if isinstance(record, dict) else None
            valid = isinstance(text, str) and not SURROGATE.search(text)
            yield Document(text if valid else None, raw.tell() - before)
            before = raw.tell()


def _zstandard_lines(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a zstandard file. Raises EOFError for a damaged or truncated one.

    It is decompressed frame by frame, since the library's own stream reader accepts a truncated file as complete.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError("reading .zst files needs the package 'zstandard'; pip install zstandard") from error
    decompressor = zstandard.ZstdDecompressor()
    frame, rest = None, b""
    try:
        while block := raw.read(1 << 17):
            while block:
                frame = frame or decompressor.decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    if frame is not None:
        raise EOFError("it is truncated")
    if rest:
        yield rest
