"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.remote import Location, location, url_of
from megahp.checkpoint.shards import DamagedError, UnreadableError, UploadError
from megahp.checkpoint.store import (
    Store,
    candidates,
    complete,
    complete_without_links,
    find,
    fingerprint,
    first_valid,
    folder_of,
    is_checkpoint,
    latest,
    load,
    none_in,
    path,
    problems,
    read_state,
    remove,
    settings_of,
    superseded,
    validation_loss_of,
    write,
)
