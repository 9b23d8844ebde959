"""The file that a rank leaves behind when it crashes or hangs."""

import contextlib
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import torch

from megahp.errors import UserError, masked
from megahp.files import open_unlinked, refuse_links


def report_crash(directory: Path, rank: int, text: str) -> None:
    """Append to this rank's own file, crashes/rank-00000.txt of the run directory. Failure to do so is ignored."""
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {socket.gethostname()}, process {os.getpid()}, rank {rank}"
    with contextlib.suppress(OSError, UserError):
        refuse_links(directory)
        (directory / "crashes").mkdir(parents=True, exist_ok=True)
        with open_unlinked(directory / "crashes" / f"rank-{rank:05d}.txt", "a") as file:
            file.write(f"{head}, torch {torch.__version__}\n{masked(text)}\n")
