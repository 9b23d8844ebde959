"""Commands as a user whom file permissions bind, also where the tests run as root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """
import contextlib, io, json, os, sys
from megahp import cli
from megahp import checkpoint, commands
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def megahp(folder: Path, *commands: str) -> list[Done]:
    """What each command ends with in this folder, one after the other in one process."""
    words = json.dumps([command.split() for command in commands])
    done = _bound(folder, "-c", SCRIPT, words)
    assert done.returncode == 0, done.stderr
    found = [Done(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    return found


def megahp_alone(folder: Path, command: str) -> Done:
    """What one command ends with, in a process that it may end itself."""
    done = _bound(folder, "-m", "megahp", *command.split())
    return Done(done.returncode, done.stdout, done.stderr)


def _bound(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    bound = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*bound, sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
