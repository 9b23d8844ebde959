"""Check that a run's layout trains the same model as one rank: a small one takes a few steps on both.

    megahp verify-layout run.toml parallel.tp=2 parallel.pp=2 --ranks 4

You see a line per difference in loss, gradients, norms or weights, the first parameters first, or that there is none.
Exit code 1: they differ; 2: invalid input.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp.commands.arguments import add_run_file
from megahp.config import resolve
from megahp.series.coding import SUFFIX

MAX_LINES = 20  # of differences


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="start N ranks on this machine")


def run(options: Namespace, words: Sequence[str]) -> int:
    config = resolve.load(options.run_file, options.overrides).config

    from megahp.diagnose.verify import verify  # imports torch: only for valid settings
    from megahp.train.prepare import load_described_tokenizer, with_vocabulary

    if config.data.tokenizer.endswith(SUFFIX):  # then the loss is restricted to levels, which are filled in from it
        config = with_vocabulary(config, load_described_tokenizer(config))
    differences = verify(config, options.ranks)
    for difference in differences[:MAX_LINES]:
        print(difference)
    same = "the same model: loss, gradients, norms and weights agree"
    result = f"{len(differences)} differences" if differences else same
    print(f"{result}, on {options.ranks} ranks and on one")
    return 1 if differences else 0
