"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_run_file(parser: Any) -> None:
    """RUN.toml, and settings that replace its own."""
    parser.add_argument("run_file", type=Path, metavar="RUN.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
