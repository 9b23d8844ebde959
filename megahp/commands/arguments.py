"""Command-line arguments that several commands share, and parsers of their values."""

import argparse
import contextlib
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from megahp.data.texts import FORMATS
from megahp.errors import UserError

UNITS = {"K": 3, "M": 6, "B": 9, "T": 12}  # powers of ten
DTYPES = ("float32", "bfloat16", "float16", "float64")  # torch's names


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """Add RUN.toml and the settings that override it."""
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="override the file's own")


def add_outputs(parser: argparse.ArgumentParser, drawn: str) -> None:
    """Add --json, and --plot for what is drawn."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {drawn}: .svg, .png or .pdf")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how texts are read."""
    add = parser.add_argument
    add("--json-key", default="text", metavar="KEY", help="field of the text in JSON, Parquet and Arrow (default text)")
    add(
        "--format", choices=FORMATS, default="auto", help="of all files: text as it is, or JSON (default: by each file)"
    )
    share = "share of the documents that may be bad (default %(default)s)"
    add("--most-bad", type=parse_share, default=0.01, metavar="SHARE", help=share)


def add_column_arguments(add: Callable[..., object]) -> None:
    """Add the options that name the columns of files of series."""
    for column in ("name", "time", "value"):
        add(f"--{column}-column", metavar="NAME", help=f"column of the series' {column} (default {column})")


def parse_share(text: str) -> float:
    """Parse a number from 0 to 1. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1, e.g. 0.01")


def parse_positive(text: str, problem: str) -> float:
    """Return a finite number above 0. Raises UserError with what is wrong and the remedy."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is {problem}")
    return value


def parse_number(text: str) -> float:
    """Parse 1.5e9, 300M, 1B or 20k as an option's value. Raises argparse.ArgumentTypeError."""
    power = UNITS.get(text[-1:].upper())
    try:
        return float(f"{text[:-1]}e{power}" if power else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write one such as 1.5e9, 300M or 1B") from None


def check_minimum(arguments: argparse.Namespace, **minima: int) -> None:
    """Raise UserError for an option that is given and below its minimum."""
    for name, minimum in minima.items():
        if (value := getattr(arguments, name)) is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")


def parse_shape(text: str, dimensions: int | None = None) -> tuple[int, ...]:
    """Parse a shape such as 8x512x256, of this number of dimensions. Raises UserError."""
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) for side in sides) or dimensions not in (None, len(sides)):
        raise UserError(f"--shape {text} must be {dimensions or 'some'} whole numbers above 0, such as 8x512x256")
    return tuple(map(int, sides))


def must_spawn(ranks: int | None, world_size: int) -> bool:
    """Return whether this command must start --ranks ranks, since no launcher did. Raises UserError."""
    if ranks in (None, world_size):
        return False
    if world_size > 1:
        raise UserError(f"--ranks {ranks}, but the launcher started {world_size}; omit --ranks")
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    return True


def parse_integers(text: str) -> list[int]:
    """Parse 1,2,3 as an option's value. Raises ValueError."""
    return [int(word) for word in text.split(",")]


def key_of(word: str) -> str:
    """Return the key of section.key=value."""
    return word.partition("=")[0]


def split_label(text: str) -> tuple[str, list[str]]:
    """Split "LABEL: section.key=value ..." into label and settings; without a label the settings make one."""
    label, colon, settings = f"{text} ".partition(": ")
    words = shlex.split(settings if colon else text)
    return label if colon else " ".join(word.partition(".")[2] for word in words) or "all", words


def folder_name(text: str) -> str:
    """Return the text as the name of a folder, without separators or other special characters."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "-"
