"""torchrun as a task of Slurm's: not ended by the signal that gives its ranks notice, and with the exit code of the
rank that failed first in place of 1."""

import os
import signal
import socket
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to all processes; a rank listens once it trains
os.environ["PET_NODE_RANK"] = os.environ["SLURM_NODEID"]  # torchrun's --node-rank
try:
    socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # or torchrun would ask for it for minutes
    main()
except socket.gaierror as error:
    sys.exit(f"megahp: MASTER_ADDR = {os.environ['MASTER_ADDR']!r} cannot be resolved on this node ({error.strerror})")
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(128 - code if code < 0 else code)
