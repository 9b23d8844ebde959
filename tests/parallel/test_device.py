"""What a process has of its machine, and what a CPU rank keeps of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megahp.parallel.device import CGROUP_V1, CGROUP_V2, fast_dtype, free_memory, memory_here, memory_limits

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


def test_the_fast_dtype_is_what_the_cpus_flags_say() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert fast_dtype(torch.device("cpu")) == ("bfloat16" if "avx512_bf16" in flags else "float32")


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_that_of_the_control_group(tmp_path: Path, version: int) -> None:
    """A job of 1 GB, 300 MB of it used, 100 of those cached files, in a group that has 0.5 GB left."""
    top = tmp_path / "memory" if version == 1 else tmp_path
    limit, used, cached = CGROUP_V1 if version == 1 else CGROUP_V2
    job = top / "slurm" / "job_7"
    job.mkdir(parents=True)
    (tmp_path / "groups").write_text("4:cpu:/\n3:memory:/slurm/job_7\n" if version == 1 else "0::/slurm/job_7\n")
    sizes = {job: (10**9, 3 * 10**8, 10**8), job.parent: (4 * 10**9, 35 * 10**8, 0)}
    for folder, (most, now, files) in sizes.items():
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cached} {files}\n")
    if version == 2:  # no limit: the word of version 2
        (top / limit).write_text("max\n")
    assert memory_limits(tmp_path / "groups", tmp_path) == [(10**9, 8 * 10**8), (4 * 10**9, 5 * 10**8)]


def test_memory_without_control_groups(tmp_path: Path) -> None:
    assert memory_limits(tmp_path / "none", tmp_path) == []


def test_free_memory_is_less_than_there_is() -> None:
    assert 0 < free_memory(torch.device("cpu")) < memory_here()
