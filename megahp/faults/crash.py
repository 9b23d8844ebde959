"""What a rank leaves behind when it ends before its time."""

import contextlib
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import torch

from megahp.errors import UserError, masked
from megahp.files import open_unlinked, refuse_links


def report_crash(directory: Path, rank: int, what: str) -> None:
    """Add what happened to this rank to its own file, crashes/rank-00000.txt of the run directory, if that can be."""
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {socket.gethostname()}, process {os.getpid()}, rank {rank}"
    with contextlib.suppress(OSError, UserError):
        refuse_links(directory)
        (directory / "crashes").mkdir(parents=True, exist_ok=True)
        with open_unlinked(directory / "crashes" / f"rank-{rank:05d}.txt", "a") as file:
            file.write(f"{head}, torch {torch.__version__}\n{masked(what)}\n")
