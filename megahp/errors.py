"""Exceptions that are reported in one line: bad input, or a machine that failed."""

import errno
import itertools
import re
import sys


class UserError(Exception):
    """A mistake in a setting, a file or a command.

    The message names in one line what is wrong (the setting or file), its value, and the remedy. The command line
    prints it without a traceback and exits with code 2.
    """

    may_pass = False  # True: a machine failed, and a restart of the training may succeed


class Fault(Exception):
    """A failure that is nobody's mistake, in one line; the run may resume from its last checkpoint."""


# what the system says of a name, a permission or a folder that a user chose, and not of a machine that fails
CHOSEN = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
CHOSEN |= {errno.ELOOP, errno.EROFS, errno.ENOTEMPTY, errno.ENXIO}


def is_user_error(error: Exception) -> bool:
    """Return whether an uncaught error comes of what a user gave, so that a restart would not help."""
    if isinstance(error, OSError):
        return error.errno in CHOSEN
    return isinstance(error, RecursionError | OverflowError | UnicodeError)


REMEDIES = {errno.EACCES: "change its permissions", errno.EPERM: "change its permissions", errno.ENOSPC: "make room"}
REMEDIES |= {errno.EDQUOT: "make room", errno.EMFILE: "raise ulimit -n"}


def in_one_line(error: Exception) -> str:
    """Return an uncaught error as one line: of the system's errors the file, what is wrong, and the remedy."""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno or 0, "name another" if is_user_error(error) else "try again")
        return f"{error.filename}: {error.strerror}; {remedy}" if error.filename else f"{error.strerror}; {remedy}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def masked(text: str) -> str:
    """Return a text without the passwords of its URLs: s3://user:password@host/b becomes s3://user:***@host/b.

    Everything written or printed passes through here, since run directories and logs are readable to others. A password
    may hold slashes and quotes, so it ends at the last @ before a space; a port, digits and a slash, is none.
    """
    return re.sub(r"(\w://[^\s/:@]*):(?!\d+(?:/|$))\S*@", r"\1:***@", text)


def complain(error: Exception | str) -> None:
    """Print what is wrong to stderr, as a line of this command's."""
    print(masked(f"megahp: {error}"), file=sys.stderr)


def nearest_divisors(number: int, to: int) -> str:
    """Return up to three divisors of `number` around `to`, for a message."""
    around = itertools.chain([to], *((to - d, to + d) for d in range(1, min(max(number, to), 10_000))))
    return ", ".join(map(str, sorted(itertools.islice((n for n in around if n > 0 and number % n == 0), 3))))


def nearest_multiples(of: int, to: int) -> str:
    """Return the multiples of `of` below and above `to`, for a message."""
    below = to // of * of
    return ", ".join(str(value) for value in (below, below + of) if value)
