"""Standard streams that training does not end with: a closed terminal, a full disk, a reader that has gone."""

import contextlib
import os
import sys
from typing import Any, TextIO


class Sparing:
    """A text stream that drops what cannot be written, and all that follows."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: closed
            self._stream = open(os.devnull, "w")  # noqa: SIM115
        return len(text)

    def flush(self) -> None:
        """Nothing: each write is flushed, so that it fails where it can be caught."""


def outlive_streams() -> None:
    """From here on let nothing that is printed end this process."""
    for descriptor in (0, 1, 2):  # one that is closed would become the first file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # one that a caller has put there
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Sparing(stream))
