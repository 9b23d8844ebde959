"""Numbers that are computed from the data, kept in the cache folder in .npy files with a checksum."""

import zlib
from pathlib import Path

import numpy as np

from megahp.errors import UserError
from megahp.files import refuse_irregular, replacing


def read_numbers(path: Path, size: int | None = None) -> np.ndarray | None:
    """Return the `size` (None = any number of) int64 stored at `path`, memory-mapped; None if missing or damaged."""
    try:
        refuse_irregular(path, "order")
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (UserError, OSError, ValueError, EOFError):
        return None
    if stored.dtype != np.int64 or stored.ndim != 1 or not len(stored) or size not in (None, len(stored) - 1):
        return None
    if stored[-1] != _checksum(stored[:-1]):
        return None
    return stored[:-1].view(np.ndarray)


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    """Store `numbers` and their checksum, atomically: other processes may read the file at any time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.save(file, np.append(numbers, _checksum(numbers)))
    except OSError as error:
        raise UserError(
            f"cache {str(path.parent)!r} cannot be written, {error.strerror}; choose another data.cache"
        ) from error


def _checksum(numbers: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(numbers).data)
