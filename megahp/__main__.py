"""`megahp`, and `python -m megahp`: the command as a process."""

from megahp import launch
from megahp.cli import main


def run() -> None:
    """Run the command of sys.argv, and end this process with its exit code."""
    launch.leave(main())


if __name__ == "__main__":
    run()
