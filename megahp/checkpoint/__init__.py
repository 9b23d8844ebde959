"""Checkpoints of whole runs, on any layout."""

from megahp.checkpoint.store import latest, load, path, read_state, save

__all__ = ["latest", "load", "path", "read_state", "save"]
