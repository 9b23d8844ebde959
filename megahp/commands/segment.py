"""For slurm/: the nodes of the next job of a chain, and the batch at which it ends."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp.commands.arguments import add_run_file
from megahp.commands.chain import chain_of, outlook
from megahp.config import resolve


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    whole = {
        "nodes": "at the first batch",
        "grow": "at the largest",
        "ranks-per-node": "GPUs of a node",
        "at-most": "that there are",
    }
    for name, meaning in whole.items():
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N", help=meaning)
    parser.add_argument("--plan", action="store_true", help="also print, for the log, what remains")


def run(options: Namespace, words: Sequence[str]) -> int:
    """Print the nodes to train on now, and the batch to stop at."""
    chain = chain_of(options, resolve.load(options.run_file, options.overrides).config)
    print(chain.growth.wanted(chain.batch, options.at_most), chain.growth.stop_at(chain.batch))
    if options.plan:
        print(outlook(chain, None), file=sys.stderr)
    return 0
