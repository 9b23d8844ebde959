"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.store import (
    DamagedError,
    Store,
    complete,
    find,
    latest,
    load,
    path,
    problems,
    read_state,
    remove,
    superseded,
    write,
)

__all__ = [
    "DamagedError",
    "Store",
    "complete",
    "find",
    "latest",
    "load",
    "path",
    "problems",
    "read_state",
    "remove",
    "superseded",
    "write",
]
