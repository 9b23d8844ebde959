"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.remote import Location, location, url_of
from megahp.checkpoint.shards import UnreadableError
from megahp.checkpoint.store import (
    DamagedError,
    Store,
    UploadError,
    candidates,
    complete,
    complete_without_links,
    find,
    first_valid,
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
