"""Ranks meet, tell each other what went wrong, and leave cleanly."""

from __future__ import annotations

import hmac
import json
import os
import socket
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Mapping
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NoReturn

from megahp.errors import Fault, UserError
from megahp.exit_codes import FINISHED, STOPPED
from megahp.launch.environment import World, expand_hostlist, int_variable, is_single_node, launch_id, mpirun_variables
from megahp.launch.secret import shared_secret

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

    from megahp.launch.signed_store import SignedStore

SECONDS_TO_EXPLAIN = 2.0  # how long the ranks are left alone once one has failed, to say why
QUIET = 10.0  # seconds for which ranks wait for each other without a word
TIMEOUT = timedelta(minutes=10)  # of ranks that wait for each other
LOOPBACK, INTERFACE = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"  # of this machine alone
MESSAGE = 4096  # bytes that MPI sends
PORTS = (20000, 12768)  # the first, and how many: below those that Linux gives to outgoing connections


def join(place: World, cuda: bool, timeout: timedelta = TIMEOUT, store: Store | None = None) -> Store:
    """Initialise the default process group: gloo for CPU tensors, NCCL for CUDA's, whose collectives fail after waiting
    for so long. Returns the store the ranks share, the given one if they have met.

    Raises UserError when what the launcher tells does not lead to the first rank, Fault when nobody answers there.
    """
    import torch.distributed as dist

    store = store or meet(place)
    if is_single_node(place):
        for library in ("GLOO", "NCCL"):  # which would listen on the network's
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", INTERFACE)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout)
    except dist.DistNetworkError as error:
        why = str(error).splitlines()[0]
        raise Fault(f"rank {place.rank} has lost its connection to rank 0's store while joining: {why}") from None
    weakref.finalize(dist.group.WORLD, lambda _: None, store)  # the group keeps the half that is C++ alone
    return store


def meet(place: World, timeout: timedelta = TIMEOUT, wait_for_all: bool = True) -> Store:
    """The store the ranks share, which the first one holds, or the torchrun or --ranks that started them. The first one
    waits there for all of them, unless it is to find out who does not come.

    MASTER_ADDR and MASTER_PORT name its place; else MPI tells it; else it follows from Slurm's or Open MPI's variables.
    Where all ranks are on this machine it listens to no network. What it holds is signed with the ranks' secret.
    Raises UserError or Fault, as join() does.
    """
    import torch.distributed as dist

    if place.size == 1:
        return dist.HashStore()
    if "MASTER_ADDR" not in os.environ and (store := _meet_by_mpi(place, timeout)):
        return store  # by which all have met
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, or --ranks
    named = os.environ.get("MASTER_ADDR")
    host = LOOPBACK if is_single_node(place) and not held else named or _first_host(os.environ)
    secret = shared_secret(is_single_node(place))
    store = _store(place, host, _port(os.environ), timeout, place.rank == 0 and not held, secret)
    if wait_for_all:
        _await_all(store, place, timeout)
    return store


def _await_all(store: Store, place: World, timeout: timedelta) -> None:
    """Say that this rank is here; the first one waits for all, and says within QUIET seconds who is missing. Raises
    Fault, on both sides of it where secrets differ."""
    store.set(f"here {place.rank}", "")
    if place.rank:
        store.check(["here 0"])
        return
    began, told = time.monotonic(), 0
    missing = set(range(1, place.size))
    while missing := {rank for rank in missing if not store.check([f"here {rank}"])}:
        waited = time.monotonic() - began
        who = f"{len(missing)} of {place.size} ranks: {', '.join(map(str, sorted(missing)[:8]))}"
        if waited > timeout.total_seconds():
            raise Fault(f"after {waited:.0f} s there are still missing {who}")
        if waited > QUIET * (6 * told + 1):
            print(f"megahp: waiting for {who}", file=sys.stderr, flush=True)
            told += 1
        time.sleep(0.1)


def local_store(port: int = 0, timeout: timedelta = TIMEOUT) -> TCPStore:
    """A store that this process holds, for ranks of this machine alone: a socket of its own would listen to all
    networks. Raises OSError where the port (0 = any) is taken."""
    from torch.distributed import TCPStore

    listener = socket.create_server((LOOPBACK, port))
    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _store(place: World, host: str, port: int, timeout: timedelta, holds: bool, common: bytes) -> SignedStore:
    """One end of the store at this address, signed with the ranks' common secret. Raises Fault where nobody answers
    there."""
    import torch.distributed as dist

    from megahp.launch.signed_store import SignedStore

    where = f"{host}:{port} (MASTER_ADDR:MASTER_PORT)"
    words = f"megahp: rank {place.rank} is waiting for rank 0 at {where}"
    waiting = threading.Timer(QUIET, lambda: print(words, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        if holds and host == LOOPBACK:
            store = local_store(port, timeout)
        else:
            store = dist.TCPStore(host, port, place.size, holds, timeout, wait_for_workers=False)
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise Fault(f"rank {place.rank} does not meet the others at {where}: {str(error).splitlines()[0]}") from None
    finally:
        waiting.cancel()
    return SignedStore(store, hmac.digest(common, launch_id(os.environ).encode(), "sha256"))


def _meet_by_mpi(place: World, timeout: timedelta) -> Store | None:
    """The first rank's store, its address, a free port and a secret told by MPI; None where mpi4py is not there, or is
    of another MPI than mpirun and sees one rank. MPI is finalized at once, so that a rank may end in any way later.
    Raises Fault on all ranks where the first has no store."""
    if not mpirun_variables(os.environ):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed; no MPI library found
        return None
    store: SignedStore | None = None
    told: dict[str, Any] = {}
    try:
        if MPI.COMM_WORLD.size != place.size:
            return None
        if place.rank == 0:
            host, common = LOOPBACK if is_single_node(place) else socket.gethostname(), token_hex(32)
            try:
                store = _store(place, host, 0, timeout, True, common.encode())
                told = {"host": host, "port": store.store.port, "secret": common}
            except Fault as fault:
                told = {"fault": str(fault)[: MESSAGE // 2]}
        message = bytearray(json.dumps(told).encode().ljust(MESSAGE))  # mpi4py pickles what is no buffer
        MPI.COMM_WORLD.Bcast(message)
        heard = json.loads(message)
        if "fault" in heard:
            raise Fault(heard["fault"])
        return store or _store(place, heard["host"], heard["port"], timeout, False, heard["secret"].encode())
    finally:
        MPI.Finalize()


def is_first_to_report(store: Store, what: str) -> bool:
    """Whether no other rank has told this before: one line is enough for what all ranks meet."""
    own = token_hex(8)
    try:
        return store.compare_set(f"told {what}", "", own) == own.encode()
    except (RuntimeError, Fault):  # the store has gone with the rank that held it; a stranger has told
        return True


def is_reported(store: Store, what: str) -> bool:
    """Whether some rank has told this, or is about to: then this rank's failure is its echo."""
    time.sleep(SECONDS_TO_EXPLAIN / 4)
    try:
        return store.check([f"told {what}"])
    except (RuntimeError, Fault):
        return False


def keep_store_alive(place: World) -> None:
    """Let the first rank, which may hold the store, stay until the others have asked it what was told."""
    if place.rank == 0 and place.size > 1:
        time.sleep(SECONDS_TO_EXPLAIN / 2)


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed since another rank has gone, in gloo's or NCCL's words."""
    from torch.distributed import DistBackendError

    return isinstance(error, DistBackendError) or "gloo/transport" in str(error)


def leave(code: int) -> NoReturn:
    """End this process. destroy_process_group() races with gloo's threads and now and then aborts, so it is skipped."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        sys.exit(code)
    if code in (FINISHED, STOPPED):  # a launcher ends all when one is gone with another code
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_host(environment: Mapping[str, str]) -> str:
    """Where rank 0 is: on the first of Slurm's node list: n[3-5,9],m1 -> n3."""
    nodes = expand_hostlist(environment.get("SLURM_STEP_NODELIST", ""))
    if mpirun_variables(environment) or not nodes:
        raise UserError(
            "MASTER_ADDR is not set and nothing else names the first rank's host; start with --ranks, torchrun or "
            "srun; under mpirun install mpi4py for its MPI, or set MASTER_ADDR and MASTER_PORT for all ranks"
        )
    return nodes[0]


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT; else the same on all ranks of an mpirun or a job step, very likely another for any other."""
    if "MASTER_PORT" in environment:
        port = int_variable(environment, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT = {port} is no port; take one of 1 to {2**16 - 1}")
        return port
    names = ("PMIX_NAMESPACE",) if mpirun_variables(environment) else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    step = " ".join(environment.get(name, "") for name in names)
    if not step.strip():
        raise UserError("nothing names the first rank's port; set MASTER_ADDR and MASTER_PORT for all ranks")
    return PORTS[0] + zlib.crc32(step.encode()) % PORTS[1]
