"""The secret by which ranks know each other."""

import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from megahp.errors import UserError

VARIABLE = "MEGAHP_SECRET"
FILE = ".megahp-secret"  # in the user's home
MIN_LENGTH = 16  # characters
REMEDY = f"set {VARIABLE} to the same random text for all ranks"


def shared_secret(is_single_node: bool = False, environment: Mapping[str, str] = os.environ) -> bytes:
    """Return MEGAHP_SECRET, which --ranks and the scripts of slurm/ draw anew for each run; else the content of a file
    in the user's home, which the first rank to come creates. Raises UserError.

    is_single_node: of this machine, whose temporary folder serves where the home cannot be written.
    """
    if VARIABLE in environment:
        where, text = VARIABLE, environment[VARIABLE]
    else:
        home = Path(os.path.expanduser("~"))
        writable = os.access(home, os.W_OK) or (home / FILE).exists()
        folder = home if writable or not is_single_node else Path(tempfile.gettempdir())
        where, text = _in_file(folder / (FILE if folder == home else f"{FILE}-{os.geteuid()}"))
    if len(text) < MIN_LENGTH:
        raise UserError(f"{where} has {len(text)} characters and needs {MIN_LENGTH}; {REMEDY}")
    return text.encode(errors="surrogateescape")


def _in_file(path: Path) -> tuple[str, str]:
    """Return the path, and the text in it. Raises UserError unless it is the user's own file, private to them."""
    try:
        if not os.path.lexists(path):
            # written under another name, then linked: the file appears whole, and only once, whichever rank is first
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:  # mode 0600
                draft.write(token_hex(32))
                draft.flush()
                with suppress(FileExistsError):  # another rank's, which is as good
                    os.link(draft.name, path)
        # O_NOFOLLOW and O_NONBLOCK: a link or a pipe that somebody else has put there is neither followed nor waited on
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                why = "is not a regular file of yours that nobody else may read (chmod 600)"
                raise UserError(f"{path} {why}; remove it, or {REMEDY}")
            return str(path), file.read(1024).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"no secret can be kept in {path} ({error}); {REMEDY}") from None
