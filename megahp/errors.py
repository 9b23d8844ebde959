"""Exceptions that are told in one line: what the user gave cannot be used, or a machine failed."""

import itertools
import sys


class UserError(Exception):
    """A mistake in a setting, a file or a command, told in one line.

    The message names what is wrong (the setting or file), its value, and the remedy.
    The command line prints it without a traceback and exits with code 2.
    """


class Fault(Exception):
    """Something broke that nobody here did wrong, told in one line; the run may go on from its last checkpoint."""


def complain(error: Exception | str) -> None:
    """Say on stderr what is wrong."""
    print(f"megahp: {error}", file=sys.stderr)


def nearest_divisors(number: int, to: int) -> str:
    """Up to three divisors of the number around a wanted one, as words."""
    around = itertools.chain([to], *((to - d, to + d) for d in range(1, min(max(number, to), 10_000))))
    return ", ".join(map(str, sorted(itertools.islice((n for n in around if n > 0 and number % n == 0), 3))))


def nearest_multiples(of: int, to: int) -> str:
    """The multiples below and above a wanted number, as words."""
    below = to // of * of
    return ", ".join(str(value) for value in (below, below + of) if value)
