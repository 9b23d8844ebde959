"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.store import DamagedError, Store, complete, find, latest, load, path, problems, read_state

__all__ = ["DamagedError", "Store", "complete", "find", "latest", "load", "path", "problems", "read_state"]
