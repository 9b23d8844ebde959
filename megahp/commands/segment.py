"""For slurm/: print the number of nodes of a chain's next job, and the batch at which it ends."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp.commands.arguments import add_run_file
from megahp.commands.chain import describe_plan, read_chain
from megahp.config import resolve


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="at the first batch")
    add("--grow", type=int, required=True, metavar="N", help="at the largest")
    add("--ranks-per-node", type=int, required=True, metavar="N", help="GPUs per node")
    add("--at-most", type=int, required=True, metavar="N", help="available nodes")
    add("--plan", action="store_true", help="also print the plan of what remains, to stderr")


def run(options: Namespace, words: Sequence[str]) -> int:
    chain = read_chain(options, resolve.load(options.run_file, options.overrides).config)
    batch = chain.plan["batch"]
    print(chain.growth.nodes_for(batch, options.at_most), chain.growth.stop_at(batch))
    if options.plan:
        print(describe_plan(chain, None), file=sys.stderr)
    return 0
