"""What the tools' commands have in common."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megahp.errors import Fault, UserError
from megahp.exit_codes import FAULT, INTERRUPTED, USER_ERROR
from megahp.launch import is_first_here


def exit_code(command: Callable[[], int]) -> int:
    """A command's own; after one line 2 for a mistake of the user's, 1 for a fault; 130 when it is interrupted."""
    try:
        return command()
    except (UserError, OSError, Fault) as error:
        if is_first_here():  # all ranks of a machine find the same
            print(f"error: {error}", file=sys.stderr)
        return FAULT if isinstance(error, Fault) else USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder's name to write under; it becomes the target by one rename, or vanishes if anything goes wrong."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def positive(text: str, remedy: str) -> float:
    """A finite number above 0. Raises UserError, which ends with the remedy."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is {remedy}")
    return value


def starts_ranks(ranks: int | None, size: int) -> bool:
    """Whether --ranks asks for ranks where a launcher has started none. Raises UserError."""
    if ranks in (None, size):
        return False
    if size > 1:
        raise UserError(f"--ranks {ranks}, but the launcher started {size}; leave --ranks out")
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    return True


def whole_numbers(text: str) -> list[int]:
    """1,2,3 as an option's value. Raises ValueError."""
    return [int(word) for word in text.split(",")]


def name_of(word: str) -> str:
    """The key of section.key=value."""
    return word.partition("=")[0]


def labelled(text: str) -> tuple[str, list[str]]:
    """LABEL: section.key=value ... as label and settings; without a label the settings are it."""
    label, colon, settings = f"{text} ".partition(": ")
    words = shlex.split(settings if colon else text)
    return label if colon else " ".join(word.partition(".")[2] for word in words) or "all", words


def plain(text: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "-"


def refuse_unwritable(*files: Path | None, plot: Path | None = None) -> None:
    """Raise UserError for files that could not be written when all is measured."""
    for file in filter(None, (*files, plot)):
        if not file.parent.is_dir():
            raise UserError(f"{file} cannot be written, {file.parent} is no folder; make it, or name another file")
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot} cannot be drawn; name a .svg, .png or .pdf file")


def about(tool: str, words: Sequence[str], *packages: str) -> dict[str, Any]:
    """When, by which command and with which versions something is measured, for a JSON file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(tool).name, *words],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", *packages)},
        },
    }
