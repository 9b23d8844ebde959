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
LEAST = 16  # characters
REMEDY = f"set {VARIABLE} to the same random text for all ranks"


def shared_secret(is_here: bool = False, environment: Mapping[str, str] = os.environ) -> bytes:
    """Return MEGAHP_SECRET, which --ranks and the scripts of slurm/ draw anew for each run; else what stands in a file
    of the user's home, which the rank that comes first makes. Raises UserError.

    is_here: all ranks are on this machine, so that its temporary folder serves where the home cannot be written.
    """
    if VARIABLE in environment:
        where, text = VARIABLE, environment[VARIABLE]
    else:
        home = Path(os.path.expanduser("~"))
        writable = os.access(home, os.W_OK) or (home / FILE).exists()
        folder = home if writable or not is_here else Path(tempfile.gettempdir())
        where, text = _in_file(folder / (FILE if folder == home else f"{FILE}-{os.geteuid()}"))
    if len(text) < LEAST:
        raise UserError(f"{where} has {len(text)} characters and needs {LEAST}; {REMEDY}")
    return text.encode(errors="surrogateescape")


def _in_file(path: Path) -> tuple[str, str]:
    try:
        if not os.path.lexists(path):
            with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:  # mode 0600
                draft.write(token_hex(32))
                draft.flush()
                with suppress(FileExistsError):  # of the rank that came first
                    os.link(draft.name, path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                why = "is not a regular file of yours that nobody else may read (chmod 600)"
                raise UserError(f"{path} {why}; remove it, or {REMEDY}")
            return str(path), file.read(1024).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"no secret can be kept in {path} ({error}); {REMEDY}") from None
