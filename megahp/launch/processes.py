"""Ranks as processes of this machine: starting them, passing signals on, ending them."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from secrets import token_hex

from megahp.exit_codes import FINAL, USER_ERROR
from megahp.launch.rendezvous import LOOPBACK, SECONDS_TO_EXPLAIN, listen, local_store
from megahp.launch.secret import VARIABLE

logger = logging.getLogger(__name__)

# signals that ask to stop: scancel's and `kill`'s; Slurm's --signal=USR1@120; a closed terminal's; ctrl-C
NOTICES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
ECHO = 5.0  # seconds within which a second signal is the first one again, passed on by a launcher or a process group
KEY_ECHO = 0.5  # of ctrl-C, which a person presses again to end at once
PR_SET_PDEATHSIG = 1


def spawn(
    arguments: Sequence[str], ranks: int, program: Sequence[str] = ("-m", "megahp"), at_notice: int | None = None
) -> int:
    """Run `python PROGRAM ARGUMENTS` as `ranks` local ranks. Returns 0, or the first failing rank's exit code; the
    others are ended then, since a rank without its peers can only hang. Signals that ask to stop are passed on.

    at_notice: returned instead where such a signal has ended a rank before it had a handler.
    """
    listener = listen()  # on a port the system picks, so that two runs never want the same one
    common = os.environ | {
        VARIABLE: token_hex(32),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(listener.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    command = [sys.executable, *program, *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    notices: list[tuple[float, int]] = []  # when, which signal

    def pass_on(number: int, _: object) -> None:
        notices.append((time.monotonic(), number))
        is_final = is_repeat(number, notices[-1][0] - notices[0][0])
        for process in processes:  # a rank that hangs would not react to the signal itself
            process.send_signal(signal.SIGKILL if is_final else number)

    patience = SECONDS_TO_EXPLAIN
    before = {number: signal.signal(number, pass_on) for number in notice_signals()}
    try:
        for rank in range(ranks):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, preexec_fn=_before_exec))
        for _, number in notices[:1]:  # it came before some were started
            for process in processes:
                process.send_signal(number)
        # The store is held here, so that ranks that lose one another can still ask it; and only from now on, since this
        # imports torch, as the ranks do at the same time. What they send to the socket before waits in it.
        _store = local_store(listener)
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.05)
            codes = [process.poll() for process in processes]
        code = exit_code(codes)
        if code == USER_ERROR:
            patience *= 5  # each rank finds it for itself, and rank 0, which tells it, may be seconds behind
        if not notices:
            return code
        is_once = not any(is_repeat(number, when - notices[0][0]) for when, number in notices)
        if at_notice is not None and is_once and code in (128 + number for _, number in notices):
            return at_notice
        return code if code in FINAL else 128 + notices[0][1]
    finally:
        end_all(processes, patience)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_all(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Let processes end by themselves for `patience` seconds, then kill those that have not: what they write is whole
    or is not there, so that killing is safe."""
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def notice_signals() -> list[signal.Signals]:
    """Return the signals that ask to stop, without those that this process was started to ignore: a hang-up under
    nohup, ctrl-C in the background of a script."""
    ignorable = (signal.SIGHUP, signal.SIGINT)
    return [number for number in NOTICES if number not in ignorable or signal.getsignal(number) != signal.SIG_IGN]


def is_repeat(number: int, since: float) -> bool:
    """Return whether a signal that comes `since` seconds after the first is a second request, and not its echo."""
    return since > (KEY_ECHO if number == signal.SIGINT else ECHO)


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when its parent is killed, which then cannot end it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)


def _before_exec() -> None:
    die_with_parent()
    # ctrl-C while a rank imports waits for allow_interrupts(), where it is no traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))


def allow_interrupts() -> None:
    """Receive the ctrl-C that spawn() keeps from a rank until it can end on one."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def exit_code(codes: Sequence[int | None]) -> int:
    """Return the exit code of these ranks together: 128 + signal if a signal has ended one, which the others' failures
    follow from, else the first that is not 0."""
    for rank, code in enumerate(codes):
        if code and code < 0:
            why = ", as Linux does where memory runs out (see dmesg)" if -code == signal.SIGKILL else ""
            logger.error(f"rank {rank} was ended by {signal.Signals(-code).name}{why}")
            return 128 - code
    return next((code for code in codes if code), 0)
