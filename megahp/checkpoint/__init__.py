"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.store import find, latest, load, path, read_state, save

__all__ = ["find", "latest", "load", "path", "read_state", "save"]
