"""Print every setting and where its value comes from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from megahp import config
from megahp.commands.arguments import add_run_file
from megahp.config import resolve


def add_arguments(parser: ArgumentParser) -> None:
    add_run_file(parser)


def run(options: Namespace, words: Sequence[str]) -> int:
    resolved = resolve.load(options.run_file, options.overrides)
    print(config.to_toml(resolved.config, resolved.origins), end="")
    return 0
