"""Standard streams that training does not end with: a closed terminal, a full disk, a reader that has gone."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)


class Sparing:
    """A text stream that drops what cannot be written: a line while a disk is full, all once nobody can read it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._spare(lambda: self._stream.write(text))
        if "\n" in text:  # here, where a failure can be caught, and not at the end of the process
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._spare(lambda: self._stream.flush())

    def _spare(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:  # ValueError: closed
            if not isinstance(error, OSError) or error.errno not in PASSING:
                self._stream = open(os.devnull, "w")  # noqa: SIM115


def outlive_streams() -> None:
    """From here on let nothing that is printed end this process."""
    for descriptor in (0, 1, 2):  # one that is closed would become the first file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # one that a caller has put there
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Sparing(stream))
