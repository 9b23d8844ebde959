"""Subcommands of `megahp` that have many options, a file each."""

from typing import Any

from megahp.commands import fit, recipe


def add_to(parsers: Any) -> None:
    """Their parsers."""
    for command in (recipe, fit):
        command.add_to(parsers)
