"""Write files and folders from commands."""

import datetime
import importlib.metadata
import json
import platform
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megahp.errors import UserError
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
    in_main = threading.current_thread() is threading.main_thread()  # no other can set handlers
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if in_main}
    try:
        yield partial
        partial.rename(target)
    except SafetensorError as error:
        raise UserError(f"{target} cannot be written ({error}); make room") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def check_writable(*files: Path | None, plot: Path | None = None) -> None:
    """Raise UserError for files that could not be written, before anything is measured."""
    for file in filter(None, (*files, plot)):
        if not file.parent.is_dir():
            raise UserError(f"{file} cannot be written, {file.parent} is no folder; make it, or name another file")
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot} cannot be drawn; name a .svg, .png or .pdf file")


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
    """Write the results if a file is named; numbers that are not finite become null."""
    if file:
        file.write_text(json.dumps(without_nan(results), indent=2) + "\n", encoding="utf-8")


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
