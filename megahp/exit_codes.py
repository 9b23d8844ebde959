"""Exit codes of `megahp` (docs/faults.md)."""

import signal

FINISHED = 0
FAULT = 1  # of a machine or of megahp: the run may resume from its last checkpoint
USER_ERROR = 2  # bad input, reported in one line: a restart would not help
NOT_CHECKED = 3  # a model is converted, but nothing independent could be compared with it
STOPPED = 75  # asked to stop, or the last step could not be saved: to be resumed from the newest checkpoint
HANG = 76  # no step for resilience.hang_after seconds: treated as a fault
NO_PROGRESS = 93  # restarted several times without a new checkpoint: needs a person
INTERRUPTED = 130  # by ctrl-C; 128 + any other signal that ended a rank

# ended by a signal that asks to stop, before a handler was installed
ENDED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
FINAL = (FINISHED, USER_ERROR, STOPPED, INTERRUPTED, *ENDED)  # after which a run is not restarted
