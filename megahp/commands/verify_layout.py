"""Check that a run's layout trains the same model as one rank: a small one takes a few steps on both."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp.commands.arguments import add_run_file
from megahp.config import resolve

SHOWN = 20  # differences between layouts, the first parameters first


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="start N ranks on this machine")


def run(options: Namespace, words: Sequence[str]) -> int:
    config = resolve.load(options.run_file, options.overrides).config

    from megahp.diagnose.verify import verify  # and with it torch, for settings that are right

    found = verify(config, options.ranks)
    for difference in found[:SHOWN]:
        print(difference)
    verdict = f"{len(found)} differences" if found else "the same model: loss, gradients, norms and weights agree"
    print(f"{verdict}, on {options.ranks} ranks and on one")
    return 1 if found else 0
