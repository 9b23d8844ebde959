"""Standard streams whose failure does not end training: a closed terminal, a full disk, a reader that has exited."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

TRANSIENT = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)


class TolerantStream:
    """A text stream that drops what cannot be written: single lines while a disk is full, all after any other error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._tolerate(lambda: self._stream.write(text))
        if "\n" in text:  # so that a failure is caught here, and does not end the process at its exit
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._tolerate(lambda: self._stream.flush())

    def _tolerate(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            if not isinstance(error, OSError) or error.errno not in TRANSIENT:
                self._stream = open(os.devnull, "w")  # noqa: SIM115


def tolerate_closed_streams() -> None:
    """Make stdout and stderr tolerant, so that nothing printed from here on can end this process."""
    for descriptor in (0, 1, 2):  # the next file to be opened would get the number of a closed one, and the output
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a caller's replacement may not be a TextIOWrapper
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, TolerantStream(stream))
