"""What ranks tell each other: JSON, whole, from every rank; errors as they were; and no pickle anywhere."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import world
from distributed.training import Training, settings_of

import megahp
from megahp import checkpoint
from megahp.config import CheckpointConfig
from megahp.errors import Fault, UserError
from megahp.parallel import messages
from megahp.parallel.messages import all_gather_json, gather_results, on_rank0

RANKS = 4
PICKLES = {"pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib"}
SENDERS = {f"{name}_object" for name in ("gather", "all_gather", "broadcast", "scatter", "send", "recv")}
SENDERS |= {f"{name}_list" for name in SENDERS}
PLANNERS = {"save", "load", "async_save", "save_state_dict", "load_state_dict"}  # DCP's, which send their plans pickled


class Special(UserError):
    pass


def attempt(function: Any, *arguments: Any, **named: Any) -> list[Any]:
    try:
        return ["value", function(*arguments, **named)]
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "may_pass", None)]


def fail(error: Exception, may_pass: bool = False) -> None:
    if isinstance(error, UserError):
        error.may_pass = may_pass
    raise error


def exchanged() -> dict[str, Any]:
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = halves[rank // 2]
    kinds = (Special, UserError, OSError)

    def only(on: int, error: Exception, may_pass: bool = False) -> Any:
        return lambda: fail(error, may_pass) if rank == on else rank

    found = {
        "all": all_gather_json({"rank": rank, "text": "ä" * 1000 * rank, "nothing": None}),
        "half": all_gather_json(rank, half),
        "results": attempt(gather_results, lambda: [rank]),
        "first": attempt(on_rank0, lambda: {"rank": rank}),
        "first of half": attempt(on_rank0, lambda: rank, half),
        "special": attempt(gather_results, only(2, Special("a\nb"), True), kinds=kinds),
        "user": attempt(gather_results, only(3, UserError("u"))),
        "system": attempt(gather_results, only(1, OSError(28, "full", "/x")), kinds=kinds),
        "other": attempt(gather_results, only(3, ZeroDivisionError("z"))),
        "first failed": attempt(on_rank0, lambda: fail(UserError("f"))),
    }
    with mock.patch.object(messages, "LARGEST", 100):
        found["large"] = attempt(all_gather_json, "x" * 99 if rank == 2 else "")
    return found


def test_everything_arrives_everywhere_and_errors_as_they_were() -> None:
    everywhere = world.run(RANKS, exchanged)
    for rank, found in enumerate(everywhere):
        first = rank == 0
        assert found["all"] == [{"rank": n, "text": "ä" * 1000 * n, "nothing": None} for n in range(RANKS)]
        assert found["half"] == [0, 1] if rank < 2 else [2, 3]
        assert found["results"] == ["value", [[n] for n in range(RANKS)] if first else []]
        assert found["first"] == ["value", {"rank": 0}]
        assert found["first of half"] == ["value", rank // 2 * 2]
        assert found["special"] == ["Special", "a\nb", True]
        assert found["user"] == ["UserError", "u", False]
        assert found["system"] == ["OSError", "[Errno 28] full: '/x'", None]
        assert found["other"] == ["Fault", "rank 3: ZeroDivisionError: z", None]
        assert found["first failed"] == ["UserError", "f", False]
        assert found["large"] == ["Fault", "a rank wants to send 101 bytes of JSON; 100 is the most", None]


@pytest.mark.parametrize(
    "sent", [pickle.dumps(1), b"{", b"\xff", b"[" * 100_000], ids=["pickle", "cut", "no text", "deep"]
)
def test_what_is_no_json_is_refused_by_rank(sent: bytes) -> None:
    with pytest.raises(Fault, match="rank 3 of its group sent invalid JSON"):
        messages._decode(torch.frombuffer(bytearray(sent), dtype=torch.uint8), 3)


def trained_and_saved(folder: str) -> list[str]:
    """The calls of PyTorch's that pickle or unpickle, in all that a run does between its ranks."""
    seen: list[str] = []
    names = ("_object_to_tensor", "_tensor_to_object")
    whole = {name: getattr(dist.distributed_c10d, name) for name in names}

    def noting(name: str) -> Any:
        return lambda *arguments: seen.append(name) or whole[name](*arguments)

    with mock.patch.multiple(dist.distributed_c10d, **{name: noting(name) for name in names}):
        all_gather = [None] * RANKS
        dist.all_gather_object(all_gather, 1)
        assert seen, "nothing would be seen"
        seen.clear()
        training = Training(settings_of("gpt2", "parallel.pp=2", "parallel.dp_shard=2"))
        training.step()
        tensors = training.engine.saved | training.optimizer.state()
        store = checkpoint.Store(Path(folder), CheckpointConfig())
        store.begin(1, tensors, {})
        store.wait()
        before = {name: value.clone() for name, value in tensors.items()}
        for value in tensors.values():
            value.zero_()
        checkpoint.load(checkpoint.path(Path(folder), 1), tensors)
        assert all(torch.equal(local_part(value), local_part(before[name])) for name, value in tensors.items())
    return seen


def local_part(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def test_nothing_is_pickled_between_ranks(tmp_path: Path) -> None:
    """In making groups, in a step on a pipeline of shards, in saving and loading what it has made."""
    assert world.run(RANKS, trained_and_saved, str(tmp_path)) == [[]] * RANKS


def pickling(source: str) -> list[str]:
    """What a file names that pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.distributed.checkpoint":
            found += [alias.name for alias in node.names if alias.name in PLANNERS]
        elif isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in SENDERS or (of, node.attr) in {("dcp", name) for name in PLANNERS}:
                found.append(node.attr)
    return found


def test_no_file_of_ours_pickles() -> None:
    """But that which reads Megatron's files, with an unpickler that executes nothing (test_convert.py)."""
    root = Path(megahp.__file__).parent
    found = {str(path.relative_to(root)): pickling(path.read_text(encoding="utf-8")) for path in root.rglob("*.py")}
    assert {name for name, calls in found.items() if calls} == {"convert/megatron.py"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "dist.broadcast_object_list(x)",
        "dcp.save(x)",
        "dist.gather_object(x)",
    ],
)
def test_a_pickle_is_seen(source: str) -> None:
    assert pickling(source)
