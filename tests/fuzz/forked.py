"""Commands in children of a fresh process that has imported what they need, and has no threads: each with what it
printed, how it ended, and the CPU time it took."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from megahp import cli, launch

HUNG, ACCEPTED = -1, 77
# what takes longer to import than most commands take
PRELOADED = ["fuzz.forked", "megahp.commands.convert", "megahp.commands.train", "megahp.train.loop", "torch._dynamo"]
PRELOADED += [
    "megahp.evaluate.perplexity",
    "megahp.report.page",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
]
PRELOADED += ["transformers.models.llama.modeling_llama", "pytest"]


@dataclass(frozen=True)
class Ended:
    code: int  # HUNG: it had to be killed; 128 + signal
    out: str
    err: str
    seconds: float  # of CPU


def run(folder: Path, words: list[str], seconds: float, before: Callable[[], object] | None = None) -> Ended:
    """`megahp WORDS` in a folder, after `before`, killed after so many seconds. A traceback ends in stderr."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    out, err, used = (folder.parent / name for name in ("out", "err", "used"))
    used.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(folder, words, before, out, err, used))
    process.start()
    process.join(seconds)
    is_hung = process.exitcode is None
    if is_hung and process.pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    code = HUNG if is_hung or process.exitcode is None else process.exitcode
    said = (file.read_text(errors="replace") if file.exists() else "" for file in (out, err))
    cpu = float(used.read_text()) if used.exists() else seconds
    return Ended(128 - code if code < 0 and not is_hung else code, *said, cpu)


def _child(
    folder: Path, words: list[str], before: Callable[[], object] | None, out: Path, err: Path, used: Path
) -> None:
    code, start = 99, os.times()
    os.setsid()
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
    # 30 GB: what a hostile number asks for is refused, and not swapped
    resource.setrlimit(resource.RLIMIT_AS, (30 << 30, 30 << 30))
    os.chdir(folder)
    ends = os._exit

    def leave(code: int) -> None:
        now = os.times()
        used.write_text(str(now.user + now.system - start.user - start.system))
        ends(code)

    os._exit = leave  # type: ignore[assignment] # by which training ends
    try:
        if before:
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


def stop_at_join() -> None:
    """Have the command end where it would begin to train, with ACCEPTED."""

    def join(*_: object, **__: object) -> None:
        os._exit(ACCEPTED)

    launch.join = join  # type: ignore[assignment]


def at_home() -> None:
    """Have the command's home here."""
    os.environ["HOME"] = os.getcwd()


def first_of_two() -> None:
    """Have the command be one of two ranks, which share a secret; the other does not come."""
    at_home()
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    port = 20000 + os.getpid() % 10000
    os.environ.update(
        {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    )


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found
