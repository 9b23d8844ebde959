"""Ranks as processes of this machine: started, told of an end that is near, ended."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from secrets import token_hex

from megahp.exit_codes import FINAL
from megahp.launch.rendezvous import LOOPBACK, SECONDS_TO_EXPLAIN, local_store
from megahp.launch.secret import VARIABLE

# of an end: scancel's and `kill`'s; Slurm's --signal=USR1@120; a closed terminal's; ctrl-C
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
SAME = 5.0  # seconds within which a second signal is the first one's echo, from a launcher or a process group
SAME_KEY = 0.5  # of ctrl-C, which a person presses again to end at once
PR_SET_PDEATHSIG = 1


def spawn(
    arguments: Sequence[str], ranks: int, program: Sequence[str] = ("-m", "megahp"), at_notice: int | None = None
) -> int:
    """Run `python PROGRAM ARGUMENTS` as so many local ranks. Returns 0, or the first failing rank's exit code;
    the others are ended then, since a rank without its peers can only hang. Signals that give notice are passed on;
    at_notice: returned where one has ended a rank that did not yet listen, if not its exit code."""
    store = local_store()  # held here, on a port the system picks, so that two runs never want the same one
    common = os.environ | {
        VARIABLE: token_hex(32),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, *program, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    notices: list[tuple[float, int]] = []  # when, which signal

    def pass_on(number: int, _: object) -> None:
        notices.append((time.monotonic(), number))
        again = is_repeat(number, notices[-1][0] - notices[0][0])  # a rank that hangs would not take it
        for process in processes:
            process.send_signal(signal.SIGKILL if again else number)

    before = {number: signal.signal(number, pass_on) for number in notice_signals()}
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=common | place, preexec_fn=die_with_parent))
        for _, number in notices[:1]:  # which came while some were not yet there
            for process in processes:
                process.send_signal(number)
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        code = _first_failure(codes)
        if not notices:
            return code
        is_once = not any(is_repeat(number, when - notices[0][0]) for when, number in notices)
        if at_notice is not None and is_once and code in (128 + number for _, number in notices):
            return at_notice
        return code if code in FINAL else 128 + notices[0][1]
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)


def notice_signals() -> list[signal.Signals]:
    """Return the signals that give notice, without those that whoever started this process wants ignored: a hang-up
    under nohup, ctrl-C in the background of a script."""
    theirs = (signal.SIGHUP, signal.SIGINT)
    return [number for number in NOTICES if number not in theirs or signal.getsignal(number) != signal.SIG_IGN]


def is_repeat(number: int, since: float) -> bool:
    """Return whether a signal, so many seconds since the first notice, is a second one and not its echo."""
    return since > (SAME_KEY if number == signal.SIGINT else SAME)


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is killed, which could not end it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _first_failure(returncodes: Sequence[int | None]) -> int:
    """The exit code of these ranks together: that of one that was ended by a signal, which is told, before others'."""
    for rank, code in enumerate(returncodes):
        if code and code < 0:
            why = ", as Linux does where memory runs out (see dmesg)" if -code == signal.SIGKILL else ""
            print(f"megahp: rank {rank} was ended by {signal.Signals(-code).name}{why}", file=sys.stderr, flush=True)
            return 128 - code
    return next((code for code in returncodes if code), 0)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that do not end by themselves. What they write is whole or is not there."""
    deadline = time.monotonic() + SECONDS_TO_EXPLAIN
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()
