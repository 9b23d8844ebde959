"""What the exit code of `megahp` says (docs/faults.md)."""

import signal

FINISHED = 0
FAULT = 1  # of a machine or of megahp: the run may go on from its last checkpoint
USER_ERROR = 2  # a mistake in what the user gave, told in one line: starting again would not help
STOPPED = 75  # told to leave, or its end could not be saved: to be gone on with from the newest checkpoint
HANG = 76  # no step for resilience.hang_after seconds: as after a fault
NO_PROGRESS = 93  # relaunched again and again without a new checkpoint: somebody must look
INTERRUPTED = 130  # by ctrl-C; 128 + any other signal that ended a rank

# told to leave before we could listen
ENDED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
FINAL = (FINISHED, USER_ERROR, STOPPED, INTERRUPTED, *ENDED)  # after which a relaunch is not ours to make
