"""What a process has of its machine, and what a CPU rank keeps of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megahp.parallel.device import free_memory, memory_here

# Allocates a tensor of 256 MiB and frees it; prints the MiB that the process then has more, and those in huge pages.
ONE_TENSOR = """
from megahp.parallel.device import keep_heap
keep_heap()
import torch
torch.ones(1024)

def rolled_up(name):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) // 1024

before = rolled_up("Rss")
x = torch.ones(1 << 26)
huge = rolled_up("AnonHugePages")
del x
print(rolled_up("Rss") - before, huge)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")


def kept(**more: str) -> tuple[int, int]:
    mine = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)} | more
    found = subprocess.check_output([sys.executable, "-c", ONE_TENSOR], env=environment, text=True)
    rest, huge = map(int, found.split())
    return rest, huge


@linux
def test_a_freed_tensor_stays_in_the_heap_in_huge_pages() -> None:
    rest, huge = kept()
    assert rest > 200
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert huge > 200 or not modes.exists() or "[never]" in modes.read_text()


@linux
@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES"])
def test_what_the_user_sets_of_malloc_stands(name: str) -> None:
    assert kept(**{name: "0" if name.startswith("MALLOC") else "glibc.malloc.top_pad=0"})[0] < 50


def test_free_memory_is_less_than_there_is() -> None:
    assert 0 < free_memory(torch.device("cpu")) < memory_here()
