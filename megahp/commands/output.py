"""Files and folders that several commands write."""

import datetime
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megahp.errors import UserError
from megahp.log.metrics import without_nan


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder's name to write under; it becomes the target by one rename, or vanishes if anything goes wrong."""
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(*files: Path | None, plot: Path | None = None) -> None:
    """Raise UserError for files that could not be written when all is measured."""
    for file in filter(None, (*files, plot)):
        if not file.parent.is_dir():
            raise UserError(f"{file} cannot be written, {file.parent} is no folder; make it, or name another file")
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot} cannot be drawn; name a .svg, .png or .pdf file")


def provenance(words: Sequence[str], *packages: str) -> dict[str, Any]:
    """When, by which command and with which versions something is measured, for a JSON file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["megahp", *words],
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", *packages)},
        },
    }


def write_json(file: Path | None, found: Mapping[str, Any]) -> None:
    """Write what was found, if a file is named; null where a number is not finite."""
    if file:
        file.write_text(json.dumps(without_nan(found), indent=2) + "\n", encoding="utf-8")
