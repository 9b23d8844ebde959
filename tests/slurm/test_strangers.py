"""Strangers who reach the ranks' store while a job of two nodes starts: they run nothing and change nothing."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from corpus import write_corpus
from launch.test_signed_store import STRANGER
from logged import numbers
from slurm.cluster import ROOT, Cluster, running
from slurm.site import ON_SLURM, RUN

from megahp.launch.rendezvous import PORTS

pytestmark = ON_SLURM


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm"), 2, first_job=7000) as cluster:
        yield cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", 0.02)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def wait_for(port: int) -> None:
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.02)


def meddle(port: int, heard: list[bytes]) -> None:
    """Come as soon as there is a store, tell what ranks tell each other, and read what they do."""
    wait_for(port)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    for key in ("told user error", "told fault", "told hang", "hang 0", "hang 1"):
        store.set(key, "x")
        store.add(f"{key} times", 1)
    heard.append(store.get("here 1"))


def test_a_stranger_at_the_store_changes_nothing(cluster: Cluster, folder: Path) -> None:
    """What the ranks of a job tell each other is signed with a secret that the job draws, and that neither Slurm nor a
    log shows."""
    script, words = f"{ROOT}/slurm/pretrain.sbatch", ("run.toml", "train.steps=6")
    train = ("sbatch", "--parsable", "--nodes=2", script, *words)
    jobs = [cluster(*train, f"log.name={name}", MEGAHP_SLURM=f"{ROOT}/slurm").strip() for name in ("met", "alone")]
    heard: list[bytes] = []
    stranger = threading.Thread(target=meddle, args=(10000 + int(jobs[0]), heard), daemon=True)
    stranger.start()
    told = "".join(cluster("scontrol", "show", "job", job) for job in jobs)
    assert [cluster.finished(job) for job in jobs] == ["COMPLETED"] * 2
    stranger.join(10)
    assert heard, "the stranger never came in"
    assert numbers(folder / "runs/met") == numbers(folder / "runs/alone")
    told += "".join(log.read_text() for log in folder.glob("*.out"))
    assert "final loss" in told.lower() and not re.search(r"MEGAHP_SECRET|[0-9a-f]{64}", told)


def test_a_stranger_who_claims_the_other_nodes_rank_is_refused(cluster: Cluster, folder: Path) -> None:
    """Under srun alone, with the user's secret: rank 1 is slow to come, and somebody else joins in its place."""
    rank = "if [ $SLURM_PROCID = 1 ]; then sleep 60; else exec python -m megahp train run.toml; fi"
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", "-c", rank]
    environment = {**cluster.environment, "HOME": str(folder)}
    run = subprocess.Popen(step, env=environment, stderr=subprocess.PIPE, text=True)
    cluster.wait(lambda: "R" in cluster("squeue", "-h", "-o", "%t"), 30)
    job = cluster("squeue", "-h", "-o", "%i").strip()
    port = PORTS[0] + zlib.crc32(f"{job} 0".encode()) % PORTS[1]
    wait_for(port)
    claimant = subprocess.Popen([sys.executable, "-c", STRANGER, str(port), str(folder / "executed")])
    try:
        said = run.communicate(timeout=60)[1]
    finally:
        claimant.kill()
        run.kill()
    assert not (folder / "executed").exists()
    assert run.returncode and [line for line in said.splitlines() if line.startswith("megahp: 'here")] == [
        "megahp: 'here 1' in the ranks' store is not signed with this run's secret: it is a stranger's, or left from "
        "an earlier attempt, or a rank has another secret; set MEGAHP_SECRET to the same random text for all ranks"
    ]


def test_each_life_of_a_job_draws_a_secret(cluster: Cluster) -> None:
    """Also where the job that submitted this one has left its own."""
    job = {
        "SLURM_JOB_ID": "7999",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_CPUS_ON_NODE": "4",
        "MEGAHP_SECRET": "0" * 64,
    }
    words = ("bash", "-c", "source $MEGAHP_SLURM/job.sh; rendezvous; env | grep MEGAHP_SECRET")
    lives = [cluster(*words, MEGAHP_SLURM=f"{ROOT}/slurm", **job) for _ in range(2)]
    assert all(re.fullmatch(r"MEGAHP_SECRET=[0-9a-f]{64}\n", life) for life in lives)
    assert len({*lives, f"MEGAHP_SECRET={'0' * 64}\n"}) == 3
