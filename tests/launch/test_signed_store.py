"""What a stranger can do who reaches the ranks' store: nothing that changes a run or is executed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megahp.errors import Fault
from megahp.launch.rendezvous import listen, local_store
from megahp.launch.signed_store import SignedStore

KEY = b"a secret of the ranks"


@pytest.fixture
def stranger() -> dist.TCPStore:
    """A connection to a store, which it holds, without the key."""
    return local_store(listen(), timeout=timedelta(seconds=20))


@pytest.fixture
def ours(stranger: dist.TCPStore) -> SignedStore:
    return SignedStore(dist.TCPStore("127.0.0.1", stranger.port, is_master=False), KEY)


def test_ranks_read_what_ranks_have_set(ours: SignedStore) -> None:
    other = ours.clone()
    ours.set("text", "ä")
    ours.set("bytes", b"\0\xff")
    ours.set("", "")
    assert [other.get(key) for key in ("text", "bytes", "")] == ["ä".encode(), b"\0\xff", b""]
    assert other.multi_get(["text", ""]) == ["ä".encode(), b""]
    assert other.check(["text", "bytes"]) and not other.check(["text", "nothing"])
    assert [ours.compare_set("claim", "", "1"), other.compare_set("claim", "", "2")] == [b"1", b"1"]
    assert other.compare_set("claim", "1", "3") == b"3" == ours.get("claim")


LOOKS: dict[str, Callable[[SignedStore], object]] = {
    "get": lambda store: store.get("here 1"),
    "multi_get": lambda store: store.multi_get(["here 0", "here 1"]),
    "check": lambda store: store.check(["here 0", "here 1"]),
    "compare_set": lambda store: store.compare_set("here 1", "", "mine"),
}
FORGERIES: dict[str, Callable[[dist.TCPStore, SignedStore], None]] = {
    "unsigned": lambda store, ours: store.set("here 1", "x" * 40),
    "short": lambda store, ours: store.set("here 1", "x"),
    "another key's": lambda store, ours: store.set("here 1", store.get("here 0")),
    "another secret's": lambda store, ours: SignedStore(store, b"other").set("here 1", "0"),
    "changed": lambda store, ours: (ours.set("here 1", "0"), store.set("here 1", b"1" + store.get("here 1")[1:]))[0],
    "a longer name's": lambda store, ours: (ours.set("here", " 1x"), store.set("here 1", b"x" + store.get("here")[3:]))[
        0
    ],
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("forge", FORGERIES)
def test_what_a_stranger_has_set_is_refused_by_name(
    stranger: dist.TCPStore, ours: SignedStore, forge: str, look: str
) -> None:
    ours.set("here 0", "0")
    FORGERIES[forge](stranger, ours)
    assert stranger.get("here 1")  # and so, on another connection, it is set
    with pytest.raises(Fault, match=r"'here 1' in the ranks' store is not signed .* set MEGAHP_SECRET"):
        LOOKS[look](ours)


STRANGER = """
import os, sys, time
import torch
import torch.distributed as dist

class Payload:
    def __reduce__(self):
        return os.mkdir, (sys.argv[2],)

while True:
    try:
        store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
        break
    except dist.DistNetworkError:
        time.sleep(0.1)
store.set("here 1", "")
print("connected", flush=True)
dist.init_process_group("gloo", store=store, rank=1, world_size=2)
dist.all_reduce(torch.zeros(1))  # as the ranks of the command do first
dist.all_gather_object([None, None], Payload())
"""


def beside_a_stranger(port: int, canary: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """The exit code and the words of rank 0 of two, in place of whose rank 1 somebody joins as it would and sends a
    pickle that acts; and how far that got."""
    first = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    claimant = subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(port), str(canary)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        said = first.communicate(timeout=60)[0]
    finally:
        first.kill()
        claimant.kill()
        heard = claimant.communicate()[0]
    return first.returncode, said, heard


def test_a_stranger_who_claims_a_rank_runs_nothing(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "HOME": str(tmp_path)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["-m", "megahp", "benchmark", "communication", "--backend", "gloo", "--sizes", "1K", "--repeats", "1"]
    code, said, heard = beside_a_stranger(port, tmp_path / "executed", *words, **place)
    assert not (tmp_path / "executed").exists() and heard == "connected\n"
    assert code == 1 and [line for line in said.splitlines() if line.startswith("megahp:")] == [
        "megahp: 'here 1' in the ranks' store is not signed with this run's secret: it is a stranger's, or left from "
        "an earlier attempt, or a rank has another secret; set MEGAHP_SECRET to the same random text for all ranks"
    ]


JOIN = """
import sys
import torch.distributed as dist
from megahp.errors import Fault
from megahp.launch.signed_store import SignedStore
ours = SignedStore(dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False), b"key")
try:
    dist.init_process_group("gloo", store=ours, rank=0, world_size=2)
except Fault as fault:
    print(fault)
"""


def test_a_strangers_address_is_refused_in_the_midst_of_torch(stranger: dist.TCPStore, tmp_path: Path) -> None:
    """gloo asks the store from C++, out of which the Fault comes as it was."""
    port = stranger.port
    code, said, heard = beside_a_stranger(port, tmp_path / "executed", "-c", JOIN, str(port))
    assert not (tmp_path / "executed").exists() and "connected" in heard
    assert code == 0 and "cpu//0/1' in the ranks' store is not signed with this run's secret" in said
