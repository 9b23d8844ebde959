"""Ranks: who a process is (environment), how they meet and leave (rendezvous), starting them here (processes)."""

from megahp.launch.environment import World, all_here, has_own_device, is_local_rank0, node_name, ranks_of_nodes, world
from megahp.launch.processes import die_with_parent, heard, is_again, spawn
from megahp.launch.rendezvous import (
    LOOPBACK,
    PATIENCE,
    is_first_to_tell,
    is_lost_connection,
    is_told,
    join,
    leave,
    meet,
    outlast_questions,
)
