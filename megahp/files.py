"""Small files that others wrote: read whole as what they should be, or refused in one line; and links, which may have
been put where a run writes."""

import errno
import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from megahp.errors import UserError

LARGEST = 2**28  # bytes; nothing that is read whole is near it
REMEDY = "mend it, or name another"


def read_toml(path: Path, what: str, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the table of a TOML file. what: what it is, such as "run file"; both are for errors. Raises UserError."""
    return _parsed(path, what, remedy, "TOML", tomllib.loads)


def read_json(path: Path, what: str, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the object of a JSON file. Raises UserError."""
    found = _parsed(path, what, remedy, "JSON", json.loads)
    if not isinstance(found, dict):
        raise UserError(f"{what} {path} holds no object, but a {type(found).__name__}; {remedy}")
    return found


def refuse_irregular(path: Path, what: str, remedy: str = REMEDY, largest: int | None = None) -> None:
    """Raise UserError for what is no regular file: of a pipe or a device nobody knows when it ends; and for one of more
    than `largest` bytes. Raises OSError, and ValueError for a NUL in the name."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
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
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what} {path} cannot be read: {why}; {remedy}") from None


def is_plain(name: str) -> bool:
    """Return whether a name that others wrote stays in the folder it is joined to: no path, and not the one above."""
    return "/" not in name and "\0" not in name and name not in ("", ".", "..")


# what a run writes; other names in its folder are its owner's
OF_RUNS = {".lock", "config.toml", "metrics.jsonl", "events.jsonl", "baselines.json", "sample.txt", "report.html"}
OF_RUNS |= {"checkpoints", "crashes", "slurm", "tensorboard", "wandb"}


def refuse_link(path: Path) -> None:
    """Raise UserError for a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which is not followed; put what it names in its place")


def refuse_links(folder: Path) -> None:
    """Raise UserError for a symbolic link in the place of what a run writes in its folder: what is read or written must
    not be redirected by whoever else may write to the folder. The folder itself may be one."""
    try:
        for name in sorted(os.listdir(folder)):
            if name in OF_RUNS or name.endswith(".part"):
                refuse_link(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return


def open_unlinked(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file of a run directory for writing, UTF-8 or bytes, but never through a symbolic link, and no pipe, for
    whose reader it would wait. Raises UserError, and OSError."""

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
            raise UserError(f"{path} is no regular file; remove it") from None
        raise


def _parsed(path: Path, what: str, remedy: str, language: str, parse: Callable[[str], Any]) -> Any:
    text = read_text(path, what, remedy)
    try:
        return parse(text)
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply to be {language} that anybody means; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not valid {language}: {error}; {remedy}") from None
