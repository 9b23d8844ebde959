"""Remote folders, through fsspec: the part of pathlib's interface that reading, listing and removing checkpoints needs,
so that code for a Path works on s3://bucket/runs/x too."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem, url_to_fs

from megahp.errors import UserError, masked


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder by its URL. Its methods raise OSError, whatever the file system's library raises."""

    url: str

    def __str__(self) -> str:
        return masked(self.url)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        with self._file_system() as (system, path), system.open(path, mode) as file:
            yield file

    def read_bytes(self) -> bytes:
        with self.open("rb") as file:
            return file.read()

    def size(self) -> int:
        """Return a file's bytes."""
        with self._file_system() as (system, path):
            return system.info(path)["size"]

    def exists(self) -> bool:
        """Return whether there is such a file or folder. Raises OSError where that cannot be known."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    def glob(self, pattern: str) -> list[Remote]:
        """Return the folder's entries whose names match; none where there is no such folder."""
        try:
            with self._file_system() as (system, path):
                system.invalidate_cache()  # another machine may have written there since
                names = [Remote(each).name for each in system.ls(path, detail=False)]
        except FileNotFoundError:
            return []
        return [self / name for name in names if fnmatch(name, pattern)]

    def put(self, files: Sequence[Path]) -> None:
        """Copy files into this folder."""
        with self._file_system() as (system, path):
            system.makedirs(path, exist_ok=True)
            system.put([str(file) for file in files], [f"{path}/{file.name}" for file in files])

    def remove(self) -> None:
        """Remove a file, or a folder with everything in it, if there is one."""
        with suppress(FileNotFoundError), self._file_system() as (system, path):
            system.rm(path, recursive=True)

    @contextmanager
    def _file_system(self) -> Iterator[tuple[AbstractFileSystem, str]]:
        try:
            yield url_to_fs(self.url)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except Exception as error:  # each library raises its own classes
            why = str(error).strip().split("\n")[0] or type(error).__name__
            raise OSError(errno.EIO, why, self.url) from error


Location = Path | Remote


def location(name: str) -> Location:
    """Return a path, or a URL's Remote. Raises UserError where its file system is not installed or cannot be
    reached."""
    if "://" not in name:
        return Path(name)
    if ":***@" in name:  # copied from a log or a checkpoint's config, where passwords are masked
        raise UserError(f"{name} lacks the password, which no file of a run keeps; write the whole URL in the run file")
    try:
        url_to_fs(name)
    except (ImportError, ValueError) as error:
        why = f"{name} cannot be opened by fsspec ({error})"
        raise UserError(f"{why}; install what it needs, or name another") from None
    except Exception as error:  # of file systems that connect at once, each its own classes
        why = f"{name} cannot be reached ({str(error) or type(error).__name__})"
        unreachable = UserError(f"{why}; try again, or name another")
        unreachable.may_pass = True
        raise unreachable from None
    return Remote(name)


def url_of(location: Location) -> str:
    """Return the name from which `location` makes the same, passwords included: for other ranks, never for a log."""
    return location.url if isinstance(location, Remote) else str(location)
