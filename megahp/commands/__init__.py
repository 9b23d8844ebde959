"""Subcommands of `megahp` that have many options, a file each."""

from typing import Any

from megahp.commands import checkpoint, evaluate, fit, grow, launch, recipe, status


def add_to(parsers: Any) -> None:
    """Their parsers."""
    for command in (recipe, fit, evaluate, checkpoint, launch, grow, status):
        command.add_to(parsers)
