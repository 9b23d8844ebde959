"""Rendezvous: ranks meet at a store, report errors to each other there, and exit without hanging one another."""

from __future__ import annotations

import hmac
import json
import logging
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

logger = logging.getLogger(__name__)

SECONDS_TO_EXPLAIN = 2.0  # that the other ranks get to report the cause, after one has failed
QUIET = 10.0  # seconds that ranks wait for each other before they log it
TIMEOUT = timedelta(minutes=10)  # of ranks that wait for each other
LOOPBACK, INTERFACE = "127.0.0.1", "lo0" if sys.platform == "darwin" else "lo"  # of this machine alone
MESSAGE = 4096  # bytes that are broadcast by MPI
PORTS = (20000, 12768)  # the first, and how many: below those that Linux gives to outgoing connections


def join(world: World, cuda: bool, timeout: timedelta = TIMEOUT, store: Store | None = None) -> Store:
    """Initialise the default process group: gloo for CPU tensors, NCCL for CUDA's, with this timeout of collectives.
    Returns the store the ranks share: the given one, if they have met.

    Raises UserError when the environment does not lead to rank 0, Fault when nobody answers there.
    """
    import torch.distributed as dist

    store = store or meet(world)
    if is_single_node(world):
        for library in ("GLOO", "NCCL"):  # which would listen on the network's interface
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", INTERFACE)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except dist.DistNetworkError as error:
        why = str(error).splitlines()[0]
        raise Fault(f"rank {world.rank} has lost its connection to rank 0's store while joining: {why}") from None
    # the group holds the C++ half of the store alone; SignedStore's Python half must live as long
    weakref.finalize(dist.group.WORLD, lambda _: None, store)
    return store


def meet(world: World, timeout: timedelta = TIMEOUT, wait_for_all: bool = True) -> Store:
    """Return the store the ranks share, which rank 0 holds, or the torchrun or --ranks that started them. Rank 0 waits
    there for all of them, unless it is to find out which do not come.

    MASTER_ADDR and MASTER_PORT name its address; else MPI broadcasts it; else it follows from Slurm's or Open MPI's
    variables. Where all ranks are on this machine it listens to no network. Its values are signed with the ranks'
    secret. Raises UserError or Fault, as join() does.
    """
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore()
    if "MASTER_ADDR" not in os.environ and (store := _meet_by_mpi(world, timeout)):
        return store  # the broadcast was a barrier
    is_held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun, or --ranks
    named = os.environ.get("MASTER_ADDR")
    host = LOOPBACK if is_single_node(world) and not is_held else named or _first_host(os.environ)
    refuse_unknown(host, "MASTER_ADDR" if named else "the first host of the job")
    secret = shared_secret(is_single_node(world))
    store = _store(world, host, _port(os.environ), timeout, world.rank == 0 and not is_held, secret)
    if not wait_for_all:
        return store
    store.set(f"here {world.rank}", "")
    if world.rank:
        store.check(["here 0"])  # raises Fault where secrets differ, as rank 0's checks do there
        return store
    start, reports = time.monotonic(), 0
    missing = set(range(1, world.size))
    while missing := {rank for rank in missing if not store.check([f"here {rank}"])}:
        waited = time.monotonic() - start
        who = f"{len(missing)} of {world.size} ranks: {', '.join(map(str, sorted(missing)[:8]))}"
        if waited > timeout.total_seconds():
            raise Fault(f"after {waited:.0f} s still waiting for {who}")
        if waited > QUIET * (6 * reports + 1):  # after 10 s, then once a minute
            logger.warning(f"waiting for {who}")
            reports += 1
        time.sleep(0.1)
    return store


def refuse_unknown(host: str, source: str) -> None:
    """Raise UserError for a name that this machine cannot resolve: torch would retry it until its timeout. In a job of
    Slurm's, where it names a node, the error may be transient."""
    try:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror:
            time.sleep(1)  # name servers are busy where a thousand ranks start
            socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a name at all, such as a label of 64 letters
        why = error.strerror if isinstance(error, OSError) else error
        unknown = UserError(
            f"{source} = {host!r}, where rank 0 is, cannot be resolved on {socket.gethostname()} ({why}); set "
            "MASTER_ADDR to an address of that machine, or add the name to /etc/hosts"
        )
        unknown.may_pass = "SLURM_JOB_ID" in os.environ
        raise unknown from None


def listen(port: int = 0) -> socket.socket:
    """Return a socket for a store for ranks of this machine alone: one of TCPStore's own would listen to all networks.
    Raises OSError where the port (0 = any) is taken."""
    return socket.create_server((LOOPBACK, port))


def local_store(listener: socket.socket, timeout: timedelta = TIMEOUT) -> TCPStore:
    """Return a store that this process holds, at this socket, which it takes over."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _store(world: World, host: str, port: int, timeout: timedelta, holds: bool, secret: bytes) -> SignedStore:
    """Return one end of the store at this address, signed with the ranks' secret. Raises Fault where nobody answers."""
    import torch.distributed as dist

    from megahp.launch.signed_store import SignedStore

    where = f"{host}:{port} (MASTER_ADDR:MASTER_PORT)"
    # TCPStore says nothing while it tries to connect
    waiting = threading.Timer(QUIET, logger.warning, [f"rank {world.rank} is waiting for rank 0 at {where}"])
    waiting.daemon = True
    waiting.start()
    try:
        if holds and host == LOOPBACK:
            store = local_store(listen(port), timeout)
        else:
            store = dist.TCPStore(host, port, world.size, holds, timeout, wait_for_workers=False)
    except (OSError, dist.DistNetworkError, dist.DistStoreError) as error:
        raise Fault(f"rank {world.rank} cannot reach the others at {where}: {str(error).splitlines()[0]}") from None
    finally:
        waiting.cancel()
    # with the launch's id in the key, what an earlier launch has left on the same port is refused
    return SignedStore(store, hmac.digest(secret, launch_id(os.environ).encode(), "sha256"))


def _meet_by_mpi(world: World, timeout: timedelta) -> Store | None:
    """Return rank 0's store, after its address, a free port and a secret were broadcast by MPI; None where mpi4py is
    not there, or is of another MPI than mpirun and sees one rank. Raises Fault on all ranks where rank 0 has no store.

    MPI is finalized at once, so that a rank may end in any way later.
    """
    if not mpirun_variables(os.environ):
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed; no MPI library found
        return None
    store: SignedStore | None = None
    sent: dict[str, Any] = {}
    try:
        if MPI.COMM_WORLD.size != world.size:
            return None
        if world.rank == 0:
            host, secret = LOOPBACK if is_single_node(world) else socket.gethostname(), token_hex(32)
            try:
                store = _store(world, host, 0, timeout, True, secret.encode())
                sent = {"host": host, "port": store.store.port, "secret": secret}
            except Fault as fault:
                sent = {"fault": str(fault)[: MESSAGE // 2]}
        message = bytearray(json.dumps(sent).encode().ljust(MESSAGE))  # a buffer: mpi4py would pickle anything else
        MPI.COMM_WORLD.Bcast(message)
        received = json.loads(message)
        if "fault" in received:
            raise Fault(received["fault"])
        secret = received["secret"].encode()
        return store or _store(world, received["host"], received["port"], timeout, False, secret)
    finally:
        MPI.Finalize()


def claim_report(store: Store, what: str) -> bool:
    """Return whether no other rank has reported this before: one line is enough for what all ranks meet."""
    claim = token_hex(8)
    try:
        return store.compare_set(f"told {what}", "", claim) == claim.encode()
    except (RuntimeError, Fault):  # the store is gone with the rank that held it; or a stranger has set it
        return True


def was_reported(store: Store, what: str) -> bool:
    """Return whether another rank has reported this, or is about to: then this rank's failure follows from it."""
    time.sleep(SECONDS_TO_EXPLAIN / 4)
    try:
        return store.check([f"told {what}"])
    except (RuntimeError, Fault):
        return False


def keep_store_alive(world: World) -> None:
    """Let rank 0, which may hold the store, stay until the others have asked it what was reported."""
    if world.rank == 0 and world.size > 1:
        time.sleep(SECONDS_TO_EXPLAIN / 2)


def is_lost_connection(error: Exception) -> bool:
    """Return whether a collective failed because another rank is gone, by gloo's or NCCL's words."""
    from torch.distributed import DistBackendError

    return isinstance(error, DistBackendError) or "gloo/transport" in str(error)


def leave(code: int) -> NoReturn:
    """End this process. destroy_process_group() races with gloo's threads and now and then aborts, so it is skipped."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        sys.exit(code)
    if code in (FINISHED, STOPPED):  # wait for the others: rank 0 may hold the store that they still use
        dist.barrier()
    sys.stdout.flush()  # os._exit does not
    sys.stderr.flush()
    os._exit(code)


def _first_host(environment: Mapping[str, str]) -> str:
    """Return rank 0's host, the first of Slurm's hostlist: n[3-5,9],m1 -> n3."""
    hosts = expand_hostlist(environment.get("SLURM_STEP_NODELIST", ""))
    if mpirun_variables(environment) or not hosts:
        raise UserError(
            "MASTER_ADDR is not set and nothing else names rank 0's host; start with --ranks, torchrun or srun; under "
            "mpirun install mpi4py for its MPI, or set MASTER_ADDR and MASTER_PORT for all ranks"
        )
    return hosts[0]


def _port(environment: Mapping[str, str]) -> int:
    """Return MASTER_PORT; else one that all ranks of an mpirun or a job step derive alike, and that others very likely
    do not."""
    if "MASTER_PORT" in environment:
        port = int_variable(environment, "MASTER_PORT")
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT = {port} is not a port; set one of 1 to {2**16 - 1}")
        return port
    names = ("PMIX_NAMESPACE",) if mpirun_variables(environment) else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    step = " ".join(environment.get(name, "") for name in names)
    if not step.strip():
        raise UserError("nothing names rank 0's port; set MASTER_ADDR and MASTER_PORT for all ranks")
    return PORTS[0] + zlib.crc32(step.encode()) % PORTS[1]
