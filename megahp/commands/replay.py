"""Repeat a run's batch decisions from its log, and compare."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.log.replay import replay


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")


def run(options: Namespace, words: Sequence[str]) -> int:
    replayed = replay(options.run)
    for step, change in replayed.changes:
        print(f"step {step:,}: {change.reason}")
    for difference in replayed.differences:
        print(f"differs from the log: {difference}", file=sys.stderr)
    if not replayed.differences:
        print(f"{len(replayed.changes)} changes of the global batch, each as logged")
    return 1 if replayed.differences else 0
