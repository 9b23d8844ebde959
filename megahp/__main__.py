"""`megahp`, and `python -m megahp`: the command as a process."""

import sys

from megahp import launch
from megahp.cli import main


def run(*command: str) -> None:
    """Run the command of sys.argv, or this one with its options, and end this process with its exit code."""
    launch.leave(main([*command, *sys.argv[1:]]))


if __name__ == "__main__":
    run()
