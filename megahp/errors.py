"""Exceptions that are told in one line: what the user gave cannot be used, or a machine failed."""

import errno
import itertools
import re
import sys


class UserError(Exception):
    """A mistake in a setting, a file or a command, told in one line.

    The message names what is wrong (the setting or file), its value, and the remedy.
    The command line prints it without a traceback and exits with code 2.
    """

    may_pass = False  # True: what a machine failed to do, which may be done when training is started again


class Fault(Exception):
    """Something broke that nobody here did wrong, told in one line; the run may go on from its last checkpoint."""


# what the system says of a name, a permission or a place that a user chose, and not of a machine that fails
CHOSEN = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}
CHOSEN |= {errno.ELOOP, errno.EROFS, errno.ENOTEMPTY, errno.ENXIO}


def is_user_error(error: Exception) -> bool:
    """Return whether an error that nobody caught speaks of what a user gave, so that to start again would not help."""
    if isinstance(error, OSError):
        return error.errno in CHOSEN
    return isinstance(error, RecursionError | OverflowError | UnicodeError)


REMEDIES = {errno.EACCES: "change its permissions", errno.EPERM: "change its permissions", errno.ENOSPC: "make room"}
REMEDIES |= {errno.EDQUOT: "make room", errno.EMFILE: "raise ulimit -n"}


def in_one_line(error: Exception) -> str:
    """Return what an error that nobody caught says, of which file, and the remedy."""
    if isinstance(error, OSError) and error.strerror:
        remedy = REMEDIES.get(error.errno or 0, "name another" if is_user_error(error) else "try again")
        return f"{error.filename}: {error.strerror}; {remedy}" if error.filename else f"{error.strerror}; {remedy}"
    return " ".join(f"{type(error).__name__}: {error}".split())


def masked(text: str) -> str:
    """Return a text without the passwords of its URLs: s3://user:password@host/b becomes s3://user:***@host/b. What is
    written or printed passes through here, since run directories and logs are readable to others. A password may hold
    slashes and quotes, so it ends at the last @ before a space; a port, digits and a slash, is none."""
    return re.sub(r"(\w://[^\s/:@]*):(?!\d+(?:/|$))\S*@", r"\1:***@", text)


def complain(error: Exception | str) -> None:
    """Say on stderr what is wrong."""
    print(masked(f"megahp: {error}"), file=sys.stderr)


def nearest_divisors(number: int, to: int) -> str:
    """Up to three divisors of the number around a wanted one, as words."""
    around = itertools.chain([to], *((to - d, to + d) for d in range(1, min(max(number, to), 10_000))))
    return ", ".join(map(str, sorted(itertools.islice((n for n in around if n > 0 and number % n == 0), 3))))


def nearest_multiples(of: int, to: int) -> str:
    """The multiples below and above a wanted number, as words."""
    below = to // of * of
    return ", ".join(str(value) for value in (below, below + of) if value)
