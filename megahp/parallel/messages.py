"""JSON between ranks. What a peer sends is parsed and never unpickled, so that it cannot be code."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megahp.errors import Fault, UserError, in_one_line
from megahp.parallel.collectives import Group, gather_into

LARGEST = 2**28  # bytes of one rank's JSON; nothing that is sent is near it
T = TypeVar("T")
Kinds = Sequence[type[Exception]]


def all_gather_json(value: Any, group: Group | None = None) -> list[Any]:
    """Return every rank's value, in the order of the group's ranks."""
    return _broadcast(_gather(value, group), group)


def gather_results(work: Callable[[], Any], group: Group | None = None, kinds: Kinds = (UserError,)) -> list[Any]:
    """Call `work` on every rank, and return what all have returned on the first rank of the group, nothing elsewhere.
    An error on one of them is raised on all: as it was if it is of these kinds (special ones first), else as a Fault.
    """
    own, cause = _outcome(work, group, kinds)
    outcomes = _gather(own, group)
    failed = _broadcast(next((each["error"] for each in outcomes if "error" in each), None), group)
    if failed:
        raise _error(failed, kinds) from cause
    return [each["value"] for each in outcomes]


def on_rank0(work: Callable[[], T], group: Group | None = None, kinds: Kinds = (UserError,)) -> T:
    """Call `work` on the first rank of the group, and return what it returns on all. An error is raised on all, as by
    `gather_results`."""
    own, cause = _outcome(work, group, kinds) if dist.get_rank(group) == 0 else (None, None)
    outcome = _broadcast(own, group)
    if "error" in outcome:
        raise _error(outcome["error"], kinds) from cause
    return outcome["value"]


def _outcome(work: Callable[[], Any], group: Group | None, kinds: Kinds) -> tuple[dict[str, Any], Exception | None]:
    try:
        return {"value": work()}, None
    except Exception as error:
        kind = next((number for number, kind in enumerate(kinds) if isinstance(error, kind)), -1)
        words = str(error) if kind >= 0 else f"rank {dist.get_rank(group)}: {in_one_line(error)}"
        return {"error": [kind, words, getattr(error, "may_pass", False)]}, error


def _error(told: Sequence[Any], kinds: Kinds) -> Exception:
    kind, words, may_pass = told
    error = kinds[kind](words) if kind in range(len(kinds)) else Fault(words)
    if isinstance(error, UserError):
        error.may_pass = may_pass is True
    return error


def _gather(value: Any, group: Group | None) -> list[Any]:
    """Every rank's value on the first rank of the group, nothing elsewhere."""
    if dist.get_world_size(group) == 1:
        return [_decoded(_encoded(value), 0)]
    data = _encoded(value)
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    gather_into(sizes, torch.tensor([data.numel()]), group)
    padded = data.new_zeros(_checked(int(sizes.max())))
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes] if dist.get_rank(group) == 0 else []
    dist.gather(padded, parts or None, group=group, group_dst=0)
    return [_decoded(part[:size], rank) for rank, (part, size) in enumerate(zip(parts, sizes, strict=False))]


def _broadcast(value: Any, group: Group | None) -> Any:
    """The first rank's value."""
    if dist.get_world_size(group) == 1:
        return _decoded(_encoded(value), 0)
    is_first = dist.get_rank(group) == 0
    data = _encoded(value) if is_first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor(data.numel())
    dist.broadcast(size, group=group, group_src=0)
    if not is_first:
        data = torch.empty(_checked(int(size)), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=0)
    return _decoded(data, 0)


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(data: Tensor, rank: int) -> Any:
    try:
        return json.loads(data.numpy().tobytes())
    except (ValueError, RecursionError):
        raise Fault(f"rank {rank} of its group has sent what is no JSON; start all ranks with one megahp") from None


def _checked(size: int) -> int:
    if not 0 < size <= LARGEST:
        raise Fault(f"a rank wants to send {size:,} bytes of JSON; {LARGEST:,} is the most")
    return size
