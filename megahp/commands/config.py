"""Print every setting of a run and where its value comes from, or describe settings."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from megahp.config import config_to_toml, resolve
from megahp.config.describe import describe
from megahp.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_file", type=Path, nargs="?", metavar="RUN.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the file's settings")
    parser.add_argument(
        "--describe", nargs="?", const="", metavar="SECTION|KEY", help="print type, bounds, default and meaning"
    )


def run(options: Namespace, words: Sequence[str]) -> int:
    if (options.run_file is None) == (options.describe is None):
        raise UserError("give either RUN.toml or --describe [SECTION|KEY]")
    if options.describe is not None:
        print(describe(options.describe))
        return 0
    resolved = resolve.load(options.run_file, options.overrides)
    print(config_to_toml(resolved.config, resolved.origins), end="")
    return 0
