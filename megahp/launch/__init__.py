"""Ranks: who a process is (environment), how ranks meet and exit (rendezvous), starting local ones (processes)."""

from megahp.launch.environment import (
    World,
    has_own_device,
    is_local_rank0,
    is_single_node,
    node_name,
    ranks_per_node,
    world,
)
from megahp.launch.processes import allow_interrupts, die_with_parent, is_repeat, notice_signals, spawn
from megahp.launch.rendezvous import (
    LOOPBACK,
    TIMEOUT,
    claim_report,
    is_lost_connection,
    join,
    keep_store_alive,
    leave,
    meet,
    was_reported,
)
