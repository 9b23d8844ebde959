"""What the tools' commands have in common."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megahp.errors import UserError
from megahp.exit_codes import INTERRUPTED, USER_ERROR


def exit_code(command: Callable[[], int]) -> int:
    """A command's own; 2, after one line, for a mistake of the user's, and 130 when it is interrupted."""
    try:
        return command()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
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


def whole_numbers(text: str) -> list[int]:
    """1,2,3 as an option's value. Raises ValueError."""
    return [int(word) for word in text.split(",")]
