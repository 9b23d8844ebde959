"""Arguments that several commands take, and how their values are read."""

import argparse
import math
import re
import shlex
from pathlib import Path

from megahp.errors import UserError

UNITS = {"K": 3, "M": 6, "B": 9, "T": 12}  # powers of ten
DTYPES = ("float32", "bfloat16", "float16", "float64")  # as torch calls them


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """RUN.toml, and settings that replace its own."""
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replace the file's own")


def add_outputs(parser: argparse.ArgumentParser, drawn: str) -> None:
    """--json and --plot, for everything that is found and for what is drawn of it."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {drawn}: .svg, .png or .pdf")


def parse_positive(text: str, remedy: str) -> float:
    """A finite number above 0. Raises UserError, which ends with the remedy."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{text!r} is {remedy}")
    return value


def parse_number(text: str) -> float:
    """1.5e9, 300M, 1B or 20k as an option's value. Raises argparse.ArgumentTypeError."""
    power = UNITS.get(text[-1:].upper())
    try:
        return float(f"{text[:-1]}e{power}" if power else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write one such as 1.5e9, 300M or 1B") from None


def check_minimum(arguments: argparse.Namespace, **least: int) -> None:
    """Raise UserError for an option that is given, and is less than it may be."""
    for name, number in least.items():
        if (value := getattr(arguments, name)) is not None and value < number:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {number}")


def parse_shape(text: str, dimensions: int | None = None) -> tuple[int, ...]:
    """8x512x256 as numbers, of so many dimensions. Raises UserError."""
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) for side in sides) or dimensions not in (None, len(sides)):
        raise UserError(f"--shape {text} must be {dimensions or 'some'} whole numbers above 0, such as 8x512x256")
    return tuple(map(int, sides))


def must_spawn(ranks: int | None, size: int) -> bool:
    """Whether --ranks asks for ranks where a launcher has started none. Raises UserError."""
    if ranks in (None, size):
        return False
    if size > 1:
        raise UserError(f"--ranks {ranks}, but the launcher started {size}; leave --ranks out")
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    return True


def parse_integers(text: str) -> list[int]:
    """1,2,3 as an option's value. Raises ValueError."""
    return [int(word) for word in text.split(",")]


def key_of(word: str) -> str:
    """The key of section.key=value."""
    return word.partition("=")[0]


def split_label(text: str) -> tuple[str, list[str]]:
    """LABEL: section.key=value ... as label and settings; without a label the settings are it."""
    label, colon, config = f"{text} ".partition(": ")
    words = shlex.split(config if colon else text)
    return label if colon else " ".join(word.partition(".")[2] for word in words) or "all", words


def folder_name(text: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "-"
