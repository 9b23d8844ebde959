"""Commands in forked children of this process, which has imported what they need: each with what it printed, how it
ended, and the CPU time it took."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy  # noqa: F401 - what children would each import
import torch  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

from megahp import cli

HUNG = -1


@dataclass(frozen=True)
class Ended:
    code: int  # HUNG: it had to be killed; 128 + signal
    out: str
    err: str
    seconds: float  # of CPU


def run(folder: Path, words: list[str], seconds: float, before: Callable[[], object] = lambda: None) -> Ended:
    """`megahp WORDS` in a folder, after `before`, killed after so many seconds. A traceback ends in stderr."""
    out, err = folder.parent / "out", folder.parent / "err"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            for number, file in ((1, out), (2, err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
            # 30 GB: what a hostile number asks for is refused, and not swapped
            resource.setrlimit(resource.RLIMIT_AS, (30 << 30, 30 << 30))
            os.chdir(folder)
            before()
            with contextlib.suppress(KeyboardInterrupt):
                code = cli.main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
            status = -1
            break
        time.sleep(0.002)
    code = HUNG if status == -1 else os.waitstatus_to_exitcode(status)
    said = (file.read_text(errors="replace") for file in (out, err))
    return Ended(128 - code if code < HUNG else code, *said, usage.ru_utime + usage.ru_stime)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found
