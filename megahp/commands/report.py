"""Write report.html of one run, or of several overlaid."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.commands.output import begins_with, check_replaceable
from megahp.report.page import TITLE, read_runs, write_report


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html in the first readable RUN)")


def run(options: Namespace, words: Sequence[str]) -> int:
    runs = read_runs(options.runs)
    out = options.out or runs[0].directory / "report.html"
    check_replaceable("--out", {out: begins_with(TITLE.encode(), 2**16)}, [])
    print(f"report: {write_report(runs, out)}")
    return 0
