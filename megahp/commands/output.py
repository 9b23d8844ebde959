"""Write files and folders from commands."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megahp import __version__, launch
from megahp.data.indexed import MAGIC, IndexedDataset
from megahp.errors import UserError
from megahp.files import read_json, replace_text
from megahp.log.metrics import without_nan


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write a folder to; it is renamed to the target, or removed on any error, SIGTERM and
    SIGHUP included.

    Raises UserError for what safetensors raises on a full disk, where the system's error is only a text.
    """

    from safetensors import SafetensorError  # which not every command that writes a file has

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    before = {number: signal.signal(number, end) for number in ending_signals()}
    try:
        yield partial
        partial.rename(target)
    except SafetensorError as error:
        raise UserError(f"{target} cannot be written ({error}); make room") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end this process if no handler is set, none in a thread that cannot set one. SIGHUP is
    not, under nohup."""
    in_main = threading.current_thread() is threading.main_thread()
    return [n for n in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(n) is not signal.SIG_IGN]


def check_replaceable(
    option: str, outputs: Mapping[Path, Callable[[Path], bool]], inputs: Iterable[Path], overwrite: bool = True
) -> None:
    """Raise UserError for an output that is one of the inputs, by whatever name, or a file that megahp did not write:
    neither may be replaced. Others may if `overwrite`. outputs: file -> whether one that exists is of megahp."""
    # a folder that is not made yet has no "..", but will have when the output is written
    places = {path: Path(os.path.realpath(path.parent), path.name) for path in outputs}
    taken: dict[tuple[int, int], Path] = {}
    if any(map(os.path.lexists, places.values())):  # or a million inputs would be asked for nothing
        for path in filter(Path.exists, inputs):
            status = path.stat()
            taken[status.st_dev, status.st_ino] = path
    for path, is_ours in outputs.items():
        if not os.path.lexists(place := places[path]):
            continue
        status = os.stat(place, follow_symlinks=place.exists())
        if read := taken.get((status.st_dev, status.st_ino)):
            raise UserError(f"{option} would replace {str(path)!r}, which is the input {str(read)!r}; choose another")
        if not place.is_file() or not is_ours(place):
            why = "which megahp did not write"
            raise UserError(f"{option} would replace {str(path)!r}, {why}; choose another, or remove it")
        if not overwrite:
            raise UserError(f"{option} {str(path)!r} exists; choose another, or add --overwrite")


def begins_with(mark: bytes, within: int = 1024) -> Callable[[Path], bool]:
    """Return a test of whether a file has a mark of megahp's within its first bytes."""

    def is_in(path: Path) -> bool:
        with open(path, "rb") as file:
            return mark in file.read(within)

    return is_in


def data_files(prefix: str) -> dict[Path, Callable[[Path], bool]]:
    """Return the files of tokenized data, and whether one that exists is of megahp, for `check_replaceable`."""
    index, has_magic = Path(f"{prefix}.idx"), begins_with(MAGIC)

    def is_description(path: Path) -> bool:
        with suppress(UserError):
            return read_json(path, "description").keys() >= {"tokenizer", "vocab_size", "eod", "documents", "tokens"}
        return False

    return {
        Path(f"{prefix}.bin"): lambda _: index.is_file() and has_magic(index),  # it has no mark of its own
        index: has_magic,
        Path(f"{prefix}.json"): is_description,
    }


def write_description(prefix: str, description: Mapping[str, Any]) -> None:
    """Write PREFIX.json beside tokenized data, atomically, with the fingerprint of the data that it describes."""
    description = {**description, "fingerprint": IndexedDataset(prefix).fingerprint}
    replace_text(Path(f"{prefix}.json"), json.dumps(description, indent=2) + "\n")


def check_outputs(options: Namespace) -> None:
    """Raise UserError for files of --json, --plot and --pareto that could not be written, or would replace another's,
    before anything is measured."""
    given = {name: vars(options).get(name) for name in ("json", "plot", "pareto")}
    files = {name: path for name, path in given.items() if isinstance(path, Path)}  # some commands' --json prints
    if not files or launch.world().rank:  # rank 0 alone writes, and other nodes' folders may differ
        return
    for name, path in files.items():
        check_folder(path)
        if name != "json" and path.suffix not in (".svg", ".png", ".pdf"):
            raise UserError(f"--{name} {path} cannot be drawn; name a .svg, .png or .pdf file")
        # matplotlib names itself in what it draws, in a PDF at the end
        is_ours = begins_with(b'"megahp"') if name == "json" else begins_with(b"atplotlib", 2**24)
        check_replaceable(f"--{name}", {path: is_ours}, [])


def check_folder(file: Path | None) -> None:
    """Raise UserError for a file in a folder that is not there."""
    if file and not file.parent.is_dir():
        raise UserError(f"{file} cannot be written, {file.parent} is no folder; make it, or name another file")


def provenance(words: Sequence[str], *packages: str) -> dict[str, Any]:
    """Return the date, command and package versions of a measurement, for a JSON file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["megahp", *words],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", *packages)},
        },
    }


def write_json(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write the results if a file is named, and with what; numbers that are not finite become null."""
    if file:
        file.write_text(json.dumps({"megahp": __version__, **without_nan(results)}, indent=2) + "\n", encoding="utf-8")


def plot_bars(
    file: Path, groups: Sequence[str], series: Mapping[str, Mapping[int, float]], xlabel: str, line: float | None = None
) -> None:
    """Draw horizontal bars, a group per label, and a vertical line. series: name -> index of the group -> value. Raises
    UserError."""
    from megahp.report.figures import PALETTE, colour, plot_in

    height = 0.8 / len(series)
    with plot_in(file, 8, 1 + 0.2 * sum(map(len, series.values()))) as figure:
        axes = figure.add_subplot()
        for index, (name, values) in enumerate(series.items()):
            # after six series colours repeat, and hatching distinguishes them
            style: dict[str, Any] = {"color": PALETTE[colour(index)], "hatch": "//" if index > 5 else None}
            bottoms = [group + index * height for group in values]
            axes.barh(bottoms, list(values.values()), height, align="edge", label=name, **style)
        if line is not None:
            axes.axvline(line, color=PALETTE["ink"], linewidth=0.5)
        axes.set_yticks([group + 0.4 for group in range(len(groups))], groups)
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
