"""Reading small files that others wrote, whole and of the right type or not at all; replacing files at once; and
refusing links where a run writes."""

import errno
import json
import os
import stat
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megahp.errors import UserError

LARGEST = 2**28  # bytes; no file that is read whole is near it
REMEDY = "fix it, or name another"


def read_toml(path: Path, what: str, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the table of a TOML file. what: its kind, such as "run file", for errors, as remedy. Raises UserError."""
    return _parsed(path, what, remedy, "TOML", tomllib.loads)


def read_json(path: Path, what: str, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError."""
    value = _parsed(path, what, remedy, "JSON", json.loads)
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} holds no object, but a {type(value).__name__}; {remedy}")
    return value


def refuse_irregular(path: Path, what: str, remedy: str = REMEDY, largest: int | None = None) -> None:
    """Raise UserError for anything but a regular file, since reading a pipe or a device may never end, and for a file
    of more than `largest` bytes. Raises OSError, and ValueError for a NUL in the name."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise UserError(f"{what} {path} is {kind}; {remedy}")
    if largest is not None and status.st_size > largest:
        raise UserError(f"{what} {path} has {status.st_size:,} bytes, and {largest:,} is the most; {remedy}")


def read_text(path: Path, what: str, remedy: str = REMEDY) -> str:
    """Return the text of a regular UTF-8 file. Raises UserError."""
    try:
        refuse_irregular(path, what, remedy, LARGEST)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} {path} cannot be read: {why}; {remedy}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which has the name of `path` when the block ends, and is removed when it raises. Other
    processes may write and read the same file at any time. Raises OSError."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file anew, in one step: it is never half written. Raises OSError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def is_plain(name: str) -> bool:
    """Return whether a file name that others wrote stays in the folder it is joined to: no path, and not its parent."""
    return "/" not in name and "\0" not in name and name not in ("", ".", "..")


# what a run writes in its folder; what is there under other names is its owner's, links too
RUN_FILES = {".lock", "config.toml", "metrics.jsonl", "events.jsonl", "baselines.json", "sample.txt", "report.html"}
RUN_FILES |= {"checkpoints", "crashes", "slurm", "tensorboard", "wandb"}


def refuse_link(path: Path) -> None:
    """Raise UserError for a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which is not followed; replace it by what it points to")


def refuse_links(folder: Path) -> None:
    """Raise UserError for a symbolic link in the place of what a run writes in its folder: others who may write to the
    folder must not redirect what is read or written. The folder itself may be a link."""
    try:
        for name in sorted(os.listdir(folder)):
            if name in RUN_FILES or name.endswith(".part"):
                refuse_link(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return


def open_unlinked(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file of a run directory for writing, UTF-8 or bytes, but never through a symbolic link, not even one made
    after `refuse_links` looked, and no pipe, for whose reader it would wait. Raises UserError, and OSError."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe that has a reader
            os.close(descriptor)
            raise OSError(errno.ENXIO, "")
        return descriptor

    try:
        return open(path, mode, buffering, encoding=None if "b" in mode else "utf-8", opener=opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link, which is not written through; remove it") from None
        if error.errno == errno.ENXIO:
            raise UserError(f"{path} is not a regular file; remove it") from None
        raise


def _parsed(path: Path, what: str, remedy: str, language: str, parse: Callable[[str], Any]) -> Any:
    text = read_text(path, what, remedy)
    try:
        return parse(text)
    except RecursionError:
        raise UserError(f"{what} {path} is {language} that is nested too deeply; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid {language}: {error}; {remedy}") from None
