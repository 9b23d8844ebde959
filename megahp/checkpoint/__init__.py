"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.remote import Place, place
from megahp.checkpoint.shards import UnreadableError
from megahp.checkpoint.store import (
    DamagedError,
    NotCopiedError,
    Store,
    candidates,
    complete,
    find,
    first_whole,
    latest,
    load,
    path,
    problems,
    read_state,
    remove,
    settings_of,
    superseded,
    write,
)
